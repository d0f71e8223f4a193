// No lanes of our own: the compiler makes vectors of the loops over single elements, with whatever the baseline has.
#pragma once

#include "kernels/lane.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

using Float16 = Float16Lane;
using BFloat16 = BFloat16Lane;

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
