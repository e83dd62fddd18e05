// libcuda: memory, streams, events, launches.
//
// A stream is a queue. It does what it is asked either as early as its waits allow or as late as somebody needs it, so that a wait that is missing
// shows: FIRST_STREAM=early|late says which the first stream is, the program's own; the others, on which it copies, are the other. Memory that is
// not yet written is 0xff: NaN in every float. A tensor ends where a page does that nobody may touch, and nobody may touch it when it is freed.

#include "device.h"
#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

Index threadIdx, blockIdx, blockDim, gridDim;

void stop(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("device in memory: ", stderr);
    vfprintf(stderr, format, arguments);
    fputs("\n", stderr);
    abort();
}

namespace {

struct Stream;

// A point in a stream.
struct Point {
    Stream *stream;
    bool reached = false;
};
using Shared = std::shared_ptr<Point>;

struct Work {
    std::function<void()> run;
    Shared after, reaches;
};

struct Stream {
    std::deque<Work> queue;
    bool early;
};

struct Event {
    Shared point;
};

std::recursive_mutex mutex;
std::deque<Stream> streams;
// By their first bytes: tensors, and page-locked memory.
std::map<uintptr_t, size_t> live, pinned;

struct Pool {
    uint64_t used = 0, most = 0;
};
Pool default_pool, other_pool;
std::map<uintptr_t, Pool *> pool_of;

void reach(const Shared &point);

void next(Stream &stream) {
    Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    if (work.after) reach(work.after);
    if (work.run) work.run();
    if (work.reaches) work.reaches->reached = true;
}

void reach(const Shared &point) {
    while (!point->reached) {
        if (point->stream->queue.empty()) stop("a point that is never reached");
        next(*point->stream);
    }
}

void finish(Stream &stream) {
    while (!stream.queue.empty()) next(stream);
}

void finish_all() {
    for (Stream &stream : streams) finish(stream);
}

void go_on() {
    for (bool any = true; any;) {
        any = false;
        for (Stream &stream : streams)
            while (stream.early && !stream.queue.empty() && !(stream.queue.front().after && !stream.queue.front().after->reached)) {
                next(stream);
                any = true;
            }
    }
}

Stream &of(void *stream) {
    if (!stream) stop("the default stream");
    return *static_cast<Stream *>(stream);
}

void add(void *stream, Work work) {
    std::lock_guard guard(mutex);
    of(stream).queue.push_back(std::move(work));
    go_on();
}

bool within(const std::map<uintptr_t, size_t> &parts, const void *place, size_t bytes) {
    auto at = reinterpret_cast<uintptr_t>(place);
    auto part = parts.upper_bound(at);
    return part != parts.begin() && at + bytes <= std::prev(part)->first + std::prev(part)->second;
}

void copy(void *stream, void *to, const void *from, size_t bytes, const void *on_device) {
    ask(stream, [=] {
        expect_live(on_device, bytes, "a copy");
        memcpy(to, from, bytes);
    });
}

// Pages for so many bytes, and one that nobody may touch. What begins in them begins so that it ends where that page begins, but for a double's
// alignment.
struct Pages {
    size_t page = sysconf(_SC_PAGESIZE), before, all;
    explicit Pages(size_t bytes) {
        size_t used = (bytes + 7) / 8 * 8, pages = (used + page - 1) / page * page;
        before = pages - used;
        all = pages + page;
    }
};

void free_now(uintptr_t place) {
    auto part = live.find(place);
    if (part == live.end()) stop("memory is freed twice");
    Pages pages(part->second);
    pool_of[place]->used -= part->second;
    live.erase(part);
    munmap(reinterpret_cast<void *>(place - pages.before), pages.all);
}

// The kernel that runs.
const char *running = nullptr;

void fault(int signal, siginfo_t *at, void *) {
    const char *who = running ? running : "a copy, or the program,";
    if (signal == SIGSEGV) stop("%s touches %p, where no tensor is", who, at->si_addr);
    stop("%s does what C leaves undefined: an address that is not aligned, an overflow, a shift", who);
}

}  // namespace

void ask(void *stream, std::function<void()> work) { add(stream, {std::move(work), nullptr, nullptr}); }

void expect_live(const void *place, size_t bytes, const char *user) {
    std::lock_guard guard(mutex);
    if (bytes > 0 && !within(live, place, bytes)) stop("%s: %zu bytes that are no tensor's", user, bytes);
}

extern "C" {

int cuInit(unsigned) {
    struct sigaction action = {};
    action.sa_sigaction = fault;
    action.sa_flags = SA_SIGINFO;
    return sigaction(SIGSEGV, &action, nullptr) | sigaction(SIGILL, &action, nullptr);
}
int cuDeviceGet(int *device, int) { return *device = 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGetName(char *name, int length, int) { return snprintf(name, length, "host memory"), 0; }
// The compute capability is 9.0; whatever else there is to have, it has.
int cuDeviceGetAttribute(int *value, int attribute, int) { return *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1, 0; }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &mutex, 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxSetCurrent(void *) { return 0; }
int cuCtxGetCurrent(void **context) { return *context = &mutex, 0; }
int cuCtxSynchronize() {
    std::lock_guard guard(mutex);
    return finish_all(), 0;
}
int cuGetErrorName(int, const char **text) { return *text = "an error of the device in memory", 0; }
int cuGetErrorString(int, const char **text) { return cuGetErrorName(0, text); }

int cuStreamCreate(void **stream, unsigned) {
    std::lock_guard guard(mutex);
    const char *first = getenv("FIRST_STREAM");
    bool first_is_early = first && !strcmp(first, "early");
    streams.push_back({{}, streams.empty() == first_is_early});
    return *stream = &streams.back(), 0;
}
int cuStreamDestroy_v2(void *stream) { return cuCtxSynchronize(); }
int cuStreamSynchronize(void *stream) {
    std::lock_guard guard(mutex);
    return finish(of(stream)), 0;
}
int cuStreamWaitEvent(void *stream, void *event, unsigned) {
    std::lock_guard guard(mutex);
    Shared point = static_cast<Event *>(event)->point;
    if (point) add(stream, {nullptr, point, nullptr});
    return 0;
}
int cuEventCreate(void **event, unsigned) { return *event = new Event, 0; }
int cuEventDestroy_v2(void *event) {
    std::lock_guard guard(mutex);
    delete static_cast<Event *>(event);
    return 0;
}
int cuEventRecord(void *event, void *stream) {
    std::lock_guard guard(mutex);
    Shared point = std::make_shared<Point>(Point{&of(stream)});
    static_cast<Event *>(event)->point = point;
    add(stream, {nullptr, nullptr, point});
    return 0;
}
int cuEventSynchronize(void *event) {
    std::lock_guard guard(mutex);
    if (Shared point = static_cast<Event *>(event)->point) reach(point);
    return 0;
}

int cuMemAllocFromPoolAsync(uintptr_t *place, size_t bytes, Pool *pool, void *) {
    std::lock_guard guard(mutex);
    Pages pages(bytes);
    void *memory = mmap(nullptr, pages.all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 2;
    *place = reinterpret_cast<uintptr_t>(memory) + pages.before;
    memset(reinterpret_cast<void *>(*place), 0xff, bytes);
    if (mprotect(static_cast<char *>(memory) + pages.all - pages.page, pages.page, PROT_NONE)) stop("no page can be closed behind a tensor");
    live[*place] = bytes;
    pool_of[*place] = pool;
    pool->used += bytes;
    pool->most = std::max(pool->most, pool->used);
    return 0;
}
int cuMemAllocAsync(uintptr_t *place, size_t bytes, void *stream) { return cuMemAllocFromPoolAsync(place, bytes, &default_pool, stream); }
int cuMemFreeAsync(uintptr_t place, void *stream) { return ask(stream, [=] { free_now(place); }), 0; }
int cuMemHostAlloc(void **place, size_t bytes, unsigned) {
    std::lock_guard guard(mutex);
    *place = malloc(bytes);
    if (!*place) return 2;
    memset(*place, 0xff, bytes);
    pinned[reinterpret_cast<uintptr_t>(*place)] = bytes;
    return 0;
}
int cuMemFreeHost(void *place) {
    std::lock_guard guard(mutex);
    auto part = pinned.find(reinterpret_cast<uintptr_t>(place));
    if (part == pinned.end()) stop("page-locked memory is freed twice");
    memset(place, 0xff, part->second);
    pinned.erase(part);
    return free(place), 0;
}
int cuMemHostRegister_v2(void *place, size_t bytes, unsigned) {
    std::lock_guard guard(mutex);
    pinned[reinterpret_cast<uintptr_t>(place)] = bytes;
    return 0;
}
int cuMemHostUnregister(void *place) {
    std::lock_guard guard(mutex);
    if (!pinned.erase(reinterpret_cast<uintptr_t>(place))) stop("memory is unlocked that was not locked");
    return 0;
}
int cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t bytes, void *stream) {
    std::lock_guard guard(mutex);
    void *place = reinterpret_cast<void *>(to);
    if (within(pinned, from, bytes)) return copy(stream, place, from, bytes, place), 0;
    // Other memory is read before the call returns.
    auto values = std::make_shared<std::vector<char>>(static_cast<const char *>(from), static_cast<const char *>(from) + bytes);
    ask(stream, [=] {
        expect_live(place, bytes, "a copy");
        memcpy(place, values->data(), bytes);
    });
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t bytes, void *stream) {
    std::lock_guard guard(mutex);
    void *place = reinterpret_cast<void *>(from);
    copy(stream, to, place, bytes, place);
    // Other memory is written before the call returns.
    if (!within(pinned, to, bytes)) finish(of(stream));
    return 0;
}
int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, void *stream) {
    void *place = reinterpret_cast<void *>(to), *source = reinterpret_cast<void *>(from);
    ask(stream, [=] { expect_live(place, bytes, "a copy"); });
    return copy(stream, place, source, bytes, source), 0;
}
int cuMemsetD8Async(uintptr_t to, unsigned char value, size_t bytes, void *stream) {
    void *place = reinterpret_cast<void *>(to);
    ask(stream, [=] {
        expect_live(place, bytes, "a fill");
        memset(place, value, bytes);
    });
    return 0;
}
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    std::lock_guard guard(mutex);
    *total = size_t{8} << 30;
    return *free = *total - default_pool.used - other_pool.used, 0;
}
int cuDeviceGetDefaultMemPool(Pool **pool, int) { return *pool = &default_pool, 0; }
int cuMemPoolCreate(Pool **pool, const void *) { return *pool = &other_pool, 0; }
int cuMemPoolTrimTo(Pool *, size_t) { return 0; }
int cuMemPoolSetAttribute(Pool *, int, void *) { return 0; }
int cuMemPoolGetAttribute(const Pool *pool, int attribute, void *value) {
    std::lock_guard guard(mutex);
    enum { RESERVED_HIGH = 6, USED_HIGH = 8 };
    bool high = attribute == RESERVED_HIGH || attribute == USED_HIGH;
    return *static_cast<uint64_t *>(value) = high ? pool->most : pool->used, 0;
}

int cuModuleLoadData(void **module, const void *) { return *module = &streams, 0; }
int cuModuleUnload(void *) { return 0; }
int cuModuleGetFunction(const void **function, void *, const char *name) { return *function = &kernel(name), 0; }
int cuLaunchKernel(const Kernel *kernel, unsigned columns, unsigned rows, unsigned layers, unsigned threads, unsigned y, unsigned z, unsigned,
                   void *stream, void **arguments, void **) {
    if (!columns || !rows || !threads || layers != 1 || y != 1 || z != 1 || rows > 65535 || threads > 1024)
        stop("%s: a grid of %u x %u x %u, blocks of %u x %u x %u", kernel->name, columns, rows, layers, threads, y, z);
    // What it takes is read before the call returns.
    std::vector<std::vector<char>> values;
    for (size_t i = 0; i < kernel->sizes.size(); i++) {
        auto value = static_cast<const char *>(arguments[i]);
        values.emplace_back(value, value + kernel->sizes[i]);
    }
    ask(stream, [=]() mutable {
        std::vector<void *> places;
        for (auto &value : values) places.push_back(value.data());
        gridDim = {columns, rows, 1};
        blockDim = {threads, 1, 1};
        running = kernel->name;
        kernel->run(places.data());
        running = nullptr;
    });
    return 0;
}

}  // extern "C"
