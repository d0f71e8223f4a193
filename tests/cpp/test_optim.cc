// kernels/optim: placeholder for the first build.
#include "check.h"
