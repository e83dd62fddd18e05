// A CUDA device in the host's memory: what driver.cpp, libraries.cpp and kernels.cpp share. See run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

// What a kernel's threads know themselves by: one of them runs at a time.
struct Index {
    unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim __attribute__((visibility("hidden")));

// A kernel: the sizes of what it takes, and what runs all of its threads.
struct Kernel {
    const char *name;
    std::vector<size_t> sizes;
    void (*run)(void **arguments);
};

// The kernel of this name, or stops.
const Kernel &kernel(const char *name);

// Has a stream do work after what it was asked for before.
void ask(void *stream, std::function<void()> work);

// Stops where bytes that are used are not all of one tensor's.
void expect_live(const void *place, size_t bytes, const char *user);

// Ends the process with a message: what is found here is an error of the program that runs.
[[noreturn]] void stop(const char *format, ...);
