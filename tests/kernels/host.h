// CUDA's names for a C compiler, and launches on the CPU: a block's threads are threads of the system, a grid's blocks come one after the other.
#include <math.h>
#include <pthread.h>
#include <stddef.h>

#define __shared__ static

typedef struct {
  unsigned x, y;
} Index;

static _Thread_local Index threadIdx, blockIdx;
static Index blockDim;
static pthread_barrier_t barrier;

static void __syncthreads(void) { pthread_barrier_wait(&barrier); }

typedef struct {
  void (*body)(void **);
  void **arguments;
  unsigned thread, columns, rows;
} Launch;

static void *run(void *pointer) {
  Launch *launch = pointer;
  threadIdx.x = launch->thread;
  for (blockIdx.y = 0; blockIdx.y < launch->rows; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < launch->columns; blockIdx.x++) {
      launch->body(launch->arguments);
      // Shared memory is the next block's only when all threads are done with it.
      __syncthreads();
    }
  return 0;
}

static int launch(void (*body)(void **), unsigned columns, unsigned rows, unsigned threads, void **arguments) {
  enum { MOST = 256 };
  pthread_t handles[MOST];
  Launch launches[MOST];
  if (threads > MOST || pthread_barrier_init(&barrier, 0, threads)) return 1;
  blockDim.x = threads;
  for (unsigned i = 0; i < threads; i++) {
    launches[i] = (Launch){body, arguments, i, columns, rows};
    if (pthread_create(&handles[i], 0, run, &launches[i])) return 1;
  }
  for (unsigned i = 0; i < threads; i++) pthread_join(handles[i], 0);
  return pthread_barrier_destroy(&barrier);
}
