// engine/adasum: against the formula in float64, written down here once more as a recursion, at 1 to 8 ranks.
#include "engine/adasum.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>

#include "base/crc32c.h"
#include "kernels/kernels.h"
#include "kernels/table.h"
#include "ranks.h"

using namespace roundel;
using namespace roundel::test;
using comm::Communicator;
using engine::Adasum;

namespace {

using Vector = std::vector<double>;

double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

Vector combine(const Vector& a, const Vector& b) {
  const double aa = dot(a, a), ab = dot(a, b), bb = dot(b, b);
  const double x = aa == 0 ? 1 : 1 - ab / (2 * aa), y = bb == 0 ? 1 : 1 - ab / (2 * bb);
  Vector sum(a.size());
  for (size_t i = 0; i < a.size(); ++i) sum[i] = x * a[i] + y * b[i];
  return sum;
}

// Of ranks [first, last), a power of two of them: halves first.
Vector combine_range(const std::vector<Vector>& all, size_t first, size_t last) {
  if (last - first == 1) return all[first];
  const size_t middle = (first + last) / 2;
  return combine(combine_range(all, first, middle), combine_range(all, middle, last));
}

Vector reference(std::vector<Vector> all) {
  size_t power = 1;
  while (2 * power <= all.size()) power *= 2;
  const size_t extra = all.size() - power;
  for (size_t r = power; r < all.size(); ++r) all[r - extra] = combine(all[r - extra], all[r]);
  return combine_range(all, 0, power);
}

// A tensor of some dtype, made of numbers that it has.
struct Tensor {
  Tensor(DType dtype, const Vector& from)
      : dtype(dtype), count(from.size()), bytes(std::max<size_t>(1, count * size_of(dtype))) {
    kernels::cast(dtype, bytes.data(), DType::Float64, from.data(), count);
  }
  View view() { return {bytes.data(), count, dtype}; }
  Vector values() const {
    Vector to(count);
    kernels::cast(DType::Float64, to.data(), dtype, bytes.data(), count);
    return to;
  }
  DType dtype;
  size_t count;
  std::vector<std::byte> bytes;
};

// What a rank contributes as its `tensor`-th: related to the others' as gradients are, so that all terms of the formula matter.
Tensor gradient(int rank, size_t tensor, DType dtype, size_t count) {
  std::minstd_rand common(static_cast<unsigned>(tensor + 1)),
      own(static_cast<unsigned>(1000 * rank + 17) + static_cast<unsigned>(tensor));
  const auto number = [](std::minstd_rand& from) { return static_cast<double>(from()) / std::minstd_rand::max() - 0.5; };
  Vector values(count);
  for (double& x : values) x = number(common) + 0.7 * number(own) * (rank + 1);
  return {dtype, values};
}

double tolerance(DType dtype) {
  switch (dtype) {
    case DType::Float64:
      return 1e-12;
    case DType::Float32:
      return 1e-6;
    case DType::Float16:
      return 6e-4;
    default:
      return 5e-3;
  }
}

void expect_close(const Vector& got, const Vector& want, double tolerance, const std::string& what) {
  double scale = 0, worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    scale = std::max(scale, std::fabs(want[i]));
    worst = std::max(worst, std::isnan(got[i]) ? INFINITY : std::fabs(got[i] - want[i]));
  }
  expect(worst <= tolerance * scale, __FILE__, __LINE__, format("%s: off by %g of %g", what.c_str(), worst, scale));
}

void expect_same_bits(Communicator& comm, const std::vector<Tensor>& tensors) {
  const auto size = static_cast<size_t>(comm.world().size);
  int32_t sum = 0;
  for (const Tensor& t : tensors)
    sum ^= static_cast<int32_t>(crc32c(t.bytes.data(), t.bytes.size(), static_cast<uint32_t>(sum)));
  std::vector<int32_t> sums(size);
  comm::Operation o;
  o.kind = OpKind::AllGather;
  o.in = {&sum, 1, DType::Int32};
  o.out = {sums.data(), size, DType::Int32};
  o.parts = plan::Parts::equal(1, comm.world().size);
  comm.run(o);
  EXPECT(std::set<int32_t>(sums.begin(), sums.end()).size() == 1);
}

// Tensors of these lengths at once.
void check(Adasum& adasum, Communicator& comm, DType dtype, const std::vector<size_t>& counts, double prescale = 1,
           double postscale = 1, bool in_place = false) {
  std::vector<Tensor> in, out;
  std::vector<std::pair<View, View>> views;
  for (size_t t = 0; t < counts.size(); ++t) {
    in.push_back(gradient(comm.world().rank, t, dtype, counts[t]));
    out.emplace_back(dtype, Vector(counts[t], 77));
  }
  for (size_t t = 0; t < counts.size(); ++t) views.emplace_back(in[t].view(), in_place ? in[t].view() : out[t].view());
  const std::vector<Tensor> before = in;
  adasum.run(views, prescale, postscale, "grad");
  for (size_t t = 0; t < counts.size(); ++t) {
    if (!in_place) EXPECT(in[t].bytes == before[t].bytes);
    if (comm.world().rank != 0) continue;  // one looks at the numbers; all have the same
    std::vector<Vector> all;
    for (int r = 0; r < comm.world().size; ++r) all.push_back(gradient(r, t, dtype, counts[t]).values());
    Vector want = reference(all);
    for (double& x : want) x *= prescale * postscale;
    expect_close((in_place ? in : out)[t].values(), want, tolerance(dtype),
                 format("%s, %d ranks, tensor %zu of %zu elements", name_of(dtype), comm.world().size, t, counts[t]));
  }
  expect_same_bits(comm, in_place ? in : out);
}

constexpr DType kFloating[] = {DType::Float32, DType::Float64, DType::Float16, DType::BFloat16};

void check_all(Communicator& comm) {
  Adasum adasum(comm);  // its workspace grows from one to the next
  for (const DType dtype : kFloating) {
    check(adasum, comm, dtype, {1});
    check(adasum, comm, dtype, {5, 0, 300});
    check(adasum, comm, dtype, {20'160});  // divides evenly: not packed
    check(adasum, comm, dtype, {20'011});  // does not
    check(adasum, comm, dtype, {20'011, 3, 0, 9000, 1}, 0.5, 3);
    check(adasum, comm, dtype, {20'160}, 2, 0.25, true);
    check(adasum, comm, dtype, {70, 30'001}, 1, 1, true);
  }
}

}  // namespace

TEST(adasum_agrees_with_the_formula_at_any_number_of_ranks) {
  for (const int size : {1, 2, 3, 4, 5, 6, 7, 8}) run_ranks(size, Wires::Shm, check_all);
  for (const int size : {2, 3}) run_ranks(size, Wires::Tcp, check_all);
  run_ranks(5, Wires::Mixed, check_all);
}

TEST(adasum_of_orthogonal_gradients_is_their_sum_and_of_equal_ones_their_mean) {
  for (const size_t count : {size_t{6}, size_t{60'000}})
    run_ranks(4, Wires::Shm, [count](Communicator& comm) {
      const auto rank = static_cast<size_t>(comm.world().rank);
      std::vector<float> apart(count), equal(count, 3), zero(count), some(count, rank == 2 ? 5.0f : 0.0f);
      for (size_t i = rank; i < count; i += 4) apart[i] = 2;
      const auto view = [](std::vector<float>& v) { return View{v.data(), v.size(), DType::Float32}; };
      Adasum(comm).run(
          {{view(apart), view(apart)}, {view(equal), view(equal)}, {view(zero), view(zero)}, {view(some), view(some)}}, 1, 1,
          "simple");
      EXPECT(apart == std::vector<float>(count, 2));
      EXPECT(equal == std::vector<float>(count, 3));
      EXPECT(zero == std::vector<float>(count, 0));
      EXPECT(some == std::vector<float>(count, 5));
    });
}

TEST(adasum_beside_a_very_small_gradient) {
  run_ranks(2, Wires::Shm, [](Communicator& comm) {
    std::vector<float> x(100, comm.world().rank == 0 ? 1e-39f : 1.0f);  // the weight of the small one is out of float32's range
    Adasum(comm).run({{{x.data(), x.size(), DType::Float32}, {x.data(), x.size(), DType::Float32}}}, 1, 1, "small");
    EXPECT(std::fabs(x[0] - 0.5f) < 1e-6f);
  });
}

TEST(adasum_refuses_what_has_no_direction) {
  run_ranks(2, Wires::Shm, [](Communicator& comm) {
    std::vector<int32_t> data(4);
    const View integers{data.data(), 4, DType::Int32}, floats{data.data(), 4, DType::Float32},
        few{data.data(), 3, DType::Float32};
    const View doubles{data.data(), 2, DType::Float64};
    const std::vector<std::vector<std::pair<View, View>>> refused = {
        {{integers, integers}}, {{floats, few}}, {{floats, integers}}, {{floats, floats}, {doubles, doubles}}};
    Adasum adasum(comm);
    for (const auto& tensors : refused) {
      try {
        adasum.run(tensors, 1, 1, "x");
        EXPECT(!"refused");
      } catch (const InvalidArgument& error) {
        EXPECT(std::string(error.what()).find("adasum 'x': expected") != std::string::npos);
      }
    }
    adasum.run({}, 1, 1, "nothing");
    check(adasum, comm, DType::Float32, {10});  // and it goes on
  });
}

TEST(adasum_tree_takes_in_every_rank_once) {
  for (int size = 1; size <= 70; ++size) {
    const auto tree = engine::adasum_tree(size);
    std::set<int> left;
    for (int r = 0; r < size; ++r) left.insert(r);
    size_t most = 1;  // ranks that so many rounds can take in
    for (const auto& round : tree) {
      std::set<int> busy;
      for (const auto [into, from] : round) {
        CHECK(into < from && left.count(into) == 1 && left.erase(from) == 1);
        CHECK(busy.insert(into).second && busy.insert(from).second);
      }
      most *= 2;
    }
    CHECK(left == std::set<int>{0});
    CHECK(most < 2 * static_cast<size_t>(size) || size == 1);
  }
}

TEST(dots_and_combinations_have_the_same_bits_on_every_isa) {
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  for (const size_t count : {0, 1, 7, 8, 9, 1000, 4099})
    for (const DType dtype : {DType::Float32, DType::Float64})
      for (const size_t shift : {0, 1}) {
        Vector numbers(2 * count + 2);
        for (double& x : numbers) x = normal(random);
        Tensor both(dtype, numbers);
        const Vector exact = both.values();
        const void *a = both.view().at(shift), *b = both.view().at(count + shift);
        const Vector x(exact.begin() + static_cast<int>(shift), exact.begin() + static_cast<int>(shift + count));
        const Vector y(exact.begin() + static_cast<int>(count + shift), exact.begin() + static_cast<int>(2 * count + shift));
        const kernels::Dots dots = kernels::dots(dtype, a, b, count);
        CHECK(std::fabs(dots.aa - dot(x, x)) <= 1e-12 * dot(x, x));
        CHECK(std::fabs(dots.ab - dot(x, y)) <= 1e-12 * (dot(x, x) + dot(y, y)));
        CHECK(std::fabs(dots.bb - dot(y, y)) <= 1e-12 * dot(y, y));
        Tensor sum(dtype, Vector(count));
        kernels::combine(dtype, sum.bytes.data(), a, b, count, 0.3, -1.7);
        Vector want(count);
        for (size_t i = 0; i < count; ++i) want[i] = 0.3 * x[i] + -1.7 * y[i];
        CHECK(Tensor(dtype, want).bytes == sum.bytes);
        for (const kernels::Table* table : kernels::tables()) {
          double sums[3] = {};
          table->dots(dtype, sums, a, b, count);
          CHECK(sums[0] == dots.aa && sums[1] == dots.ab && sums[2] == dots.bb);
          Tensor other(dtype, Vector(count));
          table->combine(dtype, other.bytes.data(), a, b, count, 0.3, -1.7);
          CHECK(other.bytes == sum.bytes);
        }
      }
  CHECK_THROWS(kernels::dots(DType::Float16, nullptr, nullptr, 0), InvalidArgument);
  CHECK_THROWS(kernels::combine(DType::Int32, nullptr, nullptr, nullptr, 0, 1, 1), InvalidArgument);
}
