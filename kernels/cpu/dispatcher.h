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

// What the dispatcher calls for a function.
template <auto Function>
struct Kernel;
template <class Result, class... Arguments, Result (*Function)(Arguments...)>
struct Kernel<Function> {
  static Result call(typename Passed<Arguments>::type... arguments) {
    return Function(arguments...);
  }
};

} // namespace tinytl::cpu
