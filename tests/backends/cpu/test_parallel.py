"""How work is shared out, by itself: in order, once, with no race that ThreadSanitizer sees."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = Path(__file__).parents[3] / "kernels" / "cpu"

# ATen's threads are OpenMP's, of which ThreadSanitizer sees no synchronisation.
PARALLEL = """
#pragma once
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>
namespace at {
inline int threads = 1;
inline int get_num_threads() {
  return threads;
}
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t, const Body& body) {
  std::vector<std::exception_ptr> failures(end > begin ? end - begin : 0);
  std::vector<std::thread> running;
  for (int64_t i = begin; i < end; ++i) {
    running.emplace_back([&, i] {
      try {
        body(i, i + 1);
      } catch (...) {
        failures[i - begin] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : running) {
    thread.join();
  }
  for (const std::exception_ptr& failure : failures) {
    if (failure) {
      std::rethrow_exception(failure);
    }
  }
}
} // namespace at
"""
VECTOR = """
#pragma once
#include <cstdint>
namespace tinytl::cpu {
inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
} // namespace tinytl::cpu
"""


def test_no_race_and_nothing_out_of_order(tmp_path):
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "ATen").mkdir()
    (tmp_path / "ATen" / "Parallel.h").write_text(PARALLEL)
    (tmp_path / "vector.h").write_text(VECTOR)
    shutil.copy(KERNELS / "parallel.h", tmp_path)
    shutil.copy(HERE / "parallel_stress.cpp", tmp_path)
    command = [*compiler, "-std=c++20", "-O1", "-g", "-pthread", "-I.", "parallel_stress.cpp", "-o", "stress"]
    flags = ["-fsanitize=thread"]
    built = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True)
    if built.returncode and "tsan" in built.stderr:  # the compiler came without its run-time library
        built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run(["./stress"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
