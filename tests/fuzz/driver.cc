// A small fuzzer for compilers without libFuzzer: replays the corpus, then mutates it for a while. An input that reaches code
// that none before it has reached joins the corpus of this run (-fsanitize-coverage=trace-pc).
//
//   fuzz_TARGET SECONDS CORPUS_DIRECTORY     a crash leaves its input in crash-TARGET, in the working directory
#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" void __sanitizer_set_death_callback(void (*callback)());

namespace {

using Input = std::vector<uint8_t>;
constexpr size_t kMaxInput = 4096;

uint8_t g_seen[1 << 16];
bool g_new_coverage = false;
Input g_current;
std::string g_crash_file;

void save_crash() {
  const int fd = ::open(g_crash_file.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  [[maybe_unused]] const ssize_t written = ::write(fd, g_current.data(), g_current.size());
  std::fprintf(stderr, "the input is in %s\n", g_crash_file.c_str());
}

// Returns whether it reached something new.
bool run(const Input& input) {
  g_current = input;
  g_new_coverage = false;
  LLVMFuzzerTestOneInput(g_current.data(), g_current.size());
  return g_new_coverage;
}

Input mutated(Input input, const std::vector<Input>& corpus, std::mt19937& random) {
  const auto below = [&](size_t n) { return n == 0 ? size_t{0} : random() % n; };
  for (size_t rounds = 1 + below(4); rounds > 0; --rounds) switch (below(6)) {
      case 0:
        if (!input.empty()) input[below(input.size())] ^= static_cast<uint8_t>(1u << below(8));
        break;
      case 1:
        if (!input.empty()) input[below(input.size())] = static_cast<uint8_t>(random());
        break;
      case 2:
        input.insert(input.begin() + static_cast<std::ptrdiff_t>(below(input.size() + 1)), static_cast<uint8_t>(random()));
        break;
      case 3:
        input.resize(below(input.size() + 1));
        break;
      case 4: {  // the end of another one
        const Input& other = corpus[below(corpus.size())];
        input.insert(input.end(), other.begin() + static_cast<std::ptrdiff_t>(below(other.size())), other.end());
        break;
      }
      default: {  // a number that matters
        const uint32_t values[] = {0, 1, 0x7f, 0xff, 0x7fffffff, 0x80000000, 0xffffffff, 0x10000};
        const uint32_t value = values[below(8)];
        const size_t at = below(input.size());
        for (size_t i = 0; i < 4 && at + i < input.size(); ++i) input[at + i] = static_cast<uint8_t>(value >> 8 * i);
      }
    }
  if (input.size() > kMaxInput) input.resize(kMaxInput);
  return input;
}

}  // namespace

extern "C" [[gnu::no_sanitize_coverage]] void __sanitizer_cov_trace_pc() {
  auto pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  uint8_t& seen = g_seen[(pc ^ pc >> 16) % sizeof g_seen];
  if (seen == 0) g_new_coverage = seen = 1;
}

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: %s SECONDS CORPUS_DIRECTORY\n", argv[0]), 2;
  g_crash_file = "crash-" + std::filesystem::path(argv[0]).filename().string();
  __sanitizer_set_death_callback(save_crash);
  std::vector<Input> corpus{Input{}};
  for (const auto& entry : std::filesystem::directory_iterator(argv[2])) {
    std::ifstream file(entry.path(), std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  const size_t kept = corpus.size();
  for (size_t i = 0; i < kept; ++i) run(corpus[i]);
  std::mt19937 random(std::random_device{}());
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[1]));
  size_t runs = kept;
  for (; std::chrono::steady_clock::now() < end; ++runs) {
    Input input = mutated(corpus[random() % corpus.size()], corpus, random);
    if (run(input)) corpus.push_back(std::move(input));
  }
  std::printf("%s: %zu inputs, %zu of them reached something new\n", argv[0], runs, corpus.size() - kept);
}
