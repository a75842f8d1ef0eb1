// How the dispatcher hands arguments to a function: strings by value, which the kernels take by reference.
#pragma once

#include <optional>
#include <string>

namespace tinytl::cpu {

template <class T>
struct Passed {
  using type = T;
};
template <>
struct Passed<const std::string&> {
  using type = std::string;
};
template <>
struct Passed<const std::optional<std::string>&> {
  using type = std::optional<std::string>;
};

} // namespace tinytl::cpu
