// What the engines' control messages say. Reports go up the tree, announcements down; each message is a sequence of them. An
// empty message is a goodbye.
#pragma once

#include <cstddef>
#include <cstdint>

namespace roundel::engine {

enum class Report : uint8_t {
  ReadyAll,  // request: all of the sender's subtree that are in its process set are ready
  Ready,     // request, list of ranks
  Joined,    // rank
};

enum class Announcement : uint8_t {
  Run,      // request, the rank that became ready last
  Refuse,   // key, text: ranks asked for different things
  JoinOver  // the rank that joined last
};

inline constexpr size_t kShortestRun = 10;  // bytes of an announcement: Run, As::Number, number, rank

// How a request is written: the number that it has got, or itself, to be numbered or not.
enum class As : uint8_t { Number, Itself, ToBeNumbered };

inline constexpr uint32_t kMostNumbers = 1u << 16;  // a program that makes up ever new names must not fill the memory

}  // namespace roundel::engine
