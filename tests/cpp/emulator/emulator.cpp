// Fibers, and the schedule that lets them meet at barriers and in warps.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

namespace {

constexpr size_t stack_size = 256 * 1024;
constexpr int warp_size = 32, plain_block_memory = 48 * 1024;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (seed %llu)\n", what, static_cast<unsigned long long>(settings().seed));
  std::_Exit(2);
}

struct Block;

// One CUDA thread. The fiber is kept for the threads of later blocks.
struct Thread {
  ucontext_t context;
  void* stack = nullptr;
  void* fake_stack = nullptr;
  Block* block = nullptr;
  unsigned index = 0;
};

struct Warp {
  int operation = 0;
  unsigned mask = 0, arrived = 0;
  alignas(16) unsigned char given[warp_size][16];
  alignas(16) unsigned char results[warp_size][16];
  std::vector<Thread*> waiting;
};

struct Block {
  unsigned index = 0;
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* begin = nullptr;
  unsigned finished = 0;
  std::vector<Thread*> runnable, at_barrier;
  std::vector<Warp> warps;
};

struct Machine {
  cudaLaunchConfig_t config;
  Body body = nullptr;
  const void* arguments = nullptr;
  std::mt19937_64 random;
  std::vector<Thread*> idle;  // fibers without a thread
  Thread* running = nullptr;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};

Machine machine;
std::map<const void*, int> allowed_block_memory;

// ---- switching; AddressSanitizer has to know which stack is in use

void arrive_in_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.running->fake_stack, &machine.scheduler_stack,
                                  &machine.scheduler_stack_size);
#endif
}

void leave_fiber() {
  Thread* self = machine.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&self->fake_stack, machine.scheduler_stack, machine.scheduler_stack_size);
#endif
  swapcontext(&self->context, &machine.scheduler);
  arrive_in_fiber();
}

void resume(Thread* thread) {
  machine.running = thread;
  threadIdx = {thread->index, 0, 0};
  blockIdx = {thread->block->index, 0, 0};
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, thread->stack, stack_size);
#endif
  swapcontext(&machine.scheduler, &thread->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
  machine.running = nullptr;
}

void fiber_main() {
  arrive_in_fiber();
  for (;;) {
    machine.body(machine.arguments);
    Block* block = machine.running->block;
    ++block->finished;
    machine.idle.push_back(machine.running);
    leave_fiber();
  }
}

Thread* new_fiber() {
  auto* thread = new Thread;
  thread->stack =
      mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (thread->stack == MAP_FAILED) fail("no memory for stacks");
  getcontext(&thread->context);
  thread->context.uc_stack.ss_sp = thread->stack;
  thread->context.uc_stack.ss_size = stack_size;
  thread->context.uc_link = nullptr;
  makecontext(&thread->context, fiber_main, 0);
  return thread;
}

template <typename T>
T* take_random(std::vector<T*>& from) {
  std::swap(from[machine.random() % from.size()], from.back());
  T* taken = from.back();
  from.pop_back();
  return taken;
}

std::unique_ptr<Block> start_block(unsigned index) {
  auto block = std::make_unique<Block>();
  block->index = index;
  const size_t bytes = machine.config.dynamicSmemBytes;
  block->memory.reset(new unsigned char[bytes]);  // aligned to 16 bytes; without a byte to spare behind it
  block->begin = block->memory.get();
  std::memset(block->begin, 0xff, bytes);
  block->warps.resize(machine.config.blockDim.x / warp_size);
  for (unsigned i = 0; i < machine.config.blockDim.x; ++i) {
    if (machine.idle.empty()) machine.idle.push_back(new_fiber());
    Thread* thread = machine.idle.back();
    machine.idle.pop_back();
    thread->block = block.get();
    thread->index = i;
    block->runnable.push_back(thread);
  }
  return block;
}

void check_progress(const Block& block) {
  if (!block.runnable.empty()) return;
  if (block.at_barrier.empty()) fail("deadlock: lanes of a warp wait for lanes that do not come");
  if (block.finished > 0) fail("barrier in threads whose block has others that have returned");
  fail("deadlock: some threads wait at a barrier, others in a warp");
}

}  // namespace

Settings& settings() {
  static Settings value;
  return value;
}

unsigned char* block_memory() { return machine.running->block->begin; }
int lane() { return static_cast<int>(machine.running->index % warp_size); }

void let_others_run() {
  machine.running->block->runnable.push_back(machine.running);
  leave_fiber();
}

void wait_for_block() {
  Block& block = *machine.running->block;
  block.at_barrier.push_back(machine.running);
  if (block.at_barrier.size() == machine.config.blockDim.x) std::swap(block.runnable, block.at_barrier);
  leave_fiber();
}

void exchange(int operation, unsigned mask, const void* value, void* result, size_t size, int source) {
  Warp& warp = machine.running->block->warps[machine.running->index / warp_size];
  const unsigned own = 1u << lane();
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.mask = mask;
  }
  if (warp.operation != operation || warp.mask != mask) fail("lanes of a warp meet in different operations");
  if ((mask & own) == 0 || (mask >> source & 1) == 0) fail("a lane outside of the mask takes part");
  std::memcpy(warp.given[lane()], value, size);
  warp.arrived |= own;
  if (warp.arrived == mask) {
    // Nobody still reads the results of the last exchange: all lanes have come here since.
    std::memcpy(warp.results, warp.given, sizeof(warp.given));
    warp.arrived = 0;
    auto& runnable = machine.running->block->runnable;
    runnable.insert(runnable.end(), warp.waiting.begin(), warp.waiting.end());
    warp.waiting.clear();
  } else {
    warp.waiting.push_back(machine.running);
    leave_fiber();
  }
  std::memcpy(result, warp.results[source], size);
}

cudaError_t allow_block_memory(const void* kernel, int bytes) {
  if (bytes > settings().max_block_memory) return cudaErrorInvalidValue;
  allowed_block_memory[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, Body body, const void* arguments) {
  const auto allowed = allowed_block_memory.find(kernel);
  const int limit = allowed == allowed_block_memory.end() ? plain_block_memory : allowed->second;
  if (config.dynamicSmemBytes > static_cast<size_t>(std::max(limit, plain_block_memory)))
    return cudaErrorInvalidValue;
  if (config.gridDim.x == 0 || config.blockDim.x == 0 || config.blockDim.x > 1024 ||
      config.blockDim.x % warp_size != 0)
    return cudaErrorInvalidConfiguration;
  machine.config = config;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  machine.body = body;
  machine.arguments = arguments;
  machine.random.seed(settings().seed);
  std::vector<unsigned> order(config.gridDim.x);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), machine.random);
  std::vector<std::unique_ptr<Block>> resident;
  while (!order.empty() || !resident.empty()) {
    while (!order.empty() && resident.size() < static_cast<size_t>(settings().resident_blocks)) {
      resident.push_back(start_block(order.back()));
      order.pop_back();
    }
    const size_t chosen = machine.random() % resident.size();
    Block& block = *resident[chosen];
    check_progress(block);
    resume(take_random(block.runnable));
    if (block.finished == config.blockDim.x) {
      std::swap(resident[chosen], resident.back());
      resident.pop_back();
    }
  }
  return cudaSuccess;
}

}  // namespace emulator
