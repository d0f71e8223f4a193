// Log lines on stderr, "roundel [rank] level: text", below the level that ROUNDEL_LOG_LEVEL sets. Any thread.
#pragma once

#include <string>

namespace roundel::log {

enum class Level { Error, Warning, Info, Debug };

// The rank that lines carry. Rank 0 also says, once in a process, which settings came under other libraries' names.
void set_rank(int rank);
void write(Level level, const std::string& text);

inline void warning(const std::string& text) { write(Level::Warning, text); }
inline void info(const std::string& text) { write(Level::Info, text); }
inline void debug(const std::string& text) { write(Level::Debug, text); }

}  // namespace roundel::log
