// Fibers, and the schedule that lets them meet at barriers and in warps.
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if defined(ANNOTATE_FIBERS)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#if defined(__x86_64__)
// Saves what a call preserves on the present stack and goes on with another. swapcontext would do, but makes
// two system calls each time, and AddressSanitizer's wrapper of it wipes the whole stack's shadow.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#endif

namespace emulator {

namespace {

constexpr size_t stack_size = 256 * 1024;
constexpr int warp_size = 32, plain_block_memory = 48 * 1024;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (seed %llu)\n", what, static_cast<unsigned long long>(settings().seed));
  std::_Exit(2);
}

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;

  void start(void* stack, size_t size, void (*function)()) {
    // As emulator_switch leaves a stack: six registers, the address to return to, and one word so that the
    // function finds the alignment that a call would have given it.
    auto** top = reinterpret_cast<void**>(static_cast<char*>(stack) + size) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(function);
    stack_pointer = top;
  }
};
void switch_context(Context& from, Context& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t context;

  void start(void* stack, size_t size, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
  }
};
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

struct Block;

struct PendingCopy {
  void* to;
  const void* from;
  size_t bytes;
};

// One CUDA thread. The fiber is kept for the threads of later blocks.
struct Thread {
  Context context;
  void* stack = nullptr;
  void* fake_stack = nullptr;
  Block* block = nullptr;
  unsigned index = 0;
  std::deque<std::vector<PendingCopy>> copies{1};  // by group, the last not committed yet
};

struct Warp {
  int operation = 0;
  unsigned mask = 0, arrived = 0;
  alignas(16) unsigned char given[warp_size][16];
  alignas(16) unsigned char results[warp_size][16];
  std::vector<Thread*> runnable, waiting;
};

struct Block {
  unsigned index = 0;
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* begin = nullptr;
  unsigned finished = 0;
  std::vector<Thread*> at_barrier;
  std::vector<Warp> warps;
  size_t present_warp = 0;

  Warp& warp_of(const Thread* thread) { return warps[thread->index / warp_size]; }
  void wake(Thread* thread) { warp_of(thread).runnable.push_back(thread); }
  bool can_run() const {
    return std::any_of(warps.begin(), warps.end(), [](const Warp& warp) { return !warp.runnable.empty(); });
  }
};

// How the next of several candidates is drawn. A fault may need that one of them is far ahead of the others,
// or far behind, which a fair draw hardly ever brings about.
enum class Policy { fair, stay, avoid };
struct Schedule {
  Policy blocks = Policy::fair, warps = Policy::fair;
  size_t avoided_block = 0, avoided_warp = 0;
  int decisions_left = 0;
};

struct Machine {
  cudaLaunchConfig_t config;
  Body body = nullptr;
  const void* arguments = nullptr;
  std::mt19937_64 random;
  Schedule schedule;
  std::vector<std::unique_ptr<Thread>> fibers;
  std::vector<Thread*> idle;  // fibers without a thread
  Thread* running = nullptr;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};

Machine machine;
std::map<const void*, int> allowed_block_memory;

// ---- switching; AddressSanitizer has to know which stack is in use

void arrive_in_fiber() {
#if defined(ANNOTATE_FIBERS)
  __sanitizer_finish_switch_fiber(machine.running->fake_stack, &machine.scheduler_stack,
                                  &machine.scheduler_stack_size);
#endif
}

void leave_fiber() {
  Thread* self = machine.running;
#if defined(ANNOTATE_FIBERS)
  __sanitizer_start_switch_fiber(&self->fake_stack, machine.scheduler_stack, machine.scheduler_stack_size);
#endif
  switch_context(self->context, machine.scheduler);
  arrive_in_fiber();
}

void resume(Thread* thread) {
  machine.running = thread;
  threadIdx = {thread->index, 0, 0};
  blockIdx = {thread->block->index, 0, 0};
#if defined(ANNOTATE_FIBERS)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, thread->stack, stack_size);
#endif
  switch_context(machine.scheduler, thread->context);
#if defined(ANNOTATE_FIBERS)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
  machine.running = nullptr;
}

void fiber_main() {
  arrive_in_fiber();
  for (;;) {
    machine.body(machine.arguments);
    wait_for_copies(0);
    if (!machine.running->copies.back().empty()) fail("a thread ends with copies that it has not committed");
    Block* block = machine.running->block;
    ++block->finished;
    machine.idle.push_back(machine.running);
    leave_fiber();
  }
}

Thread* new_fiber() {
  machine.fibers.push_back(std::make_unique<Thread>());
  Thread* thread = machine.fibers.back().get();
  thread->stack =
      mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (thread->stack == MAP_FAILED) fail("no memory for stacks");
  thread->context.start(thread->stack, stack_size, fiber_main);
  return thread;
}

// One of `count` candidates for which `possible` holds, or `count` if there is none.
template <typename F>
size_t draw(size_t count, Policy policy, size_t present, size_t avoided, F&& possible) {
  if (policy == Policy::stay && present < count && possible(present)) return present;
  const size_t start = machine.random() % count;
  size_t last_resort = count;
  for (size_t i = 0; i < count; ++i) {
    const size_t candidate = (start + i) % count;
    if (!possible(candidate)) continue;
    if (policy != Policy::avoid || candidate != avoided) return candidate;
    last_resort = candidate;
  }
  return last_resort;
}

void change_schedule() {
  Schedule& schedule = machine.schedule;
  if (--schedule.decisions_left > 0) return;
  schedule.blocks = static_cast<Policy>(machine.random() % 3);
  schedule.warps = static_cast<Policy>(machine.random() % 3);
  schedule.avoided_block = machine.random() % settings().resident_blocks;
  schedule.avoided_warp = machine.random() % (machine.config.blockDim.x / warp_size);
  schedule.decisions_left = 1 << machine.random() % 15;
}

Thread* next_thread(Block& block) {
  const Schedule& schedule = machine.schedule;
  block.present_warp = draw(block.warps.size(), schedule.warps, block.present_warp, schedule.avoided_warp,
                            [&](size_t i) { return !block.warps[i].runnable.empty(); });
  auto& threads = block.warps[block.present_warp].runnable;
  std::swap(threads[machine.random() % threads.size()], threads.back());
  Thread* thread = threads.back();
  threads.pop_back();
  return thread;
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
    block->wake(thread);
  }
  return block;
}

void check_progress(const Block& block) {
  if (block.can_run()) return;
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
  machine.running->block->wake(machine.running);
  leave_fiber();
}

void start_copy(void* shared, const void* global, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 || reinterpret_cast<uintptr_t>(global) % bytes != 0)
    fail("a copy to or from what is no multiple of its size");
  if (machine.random() % 2 == 0)  // it may arrive at any time until it is waited for
    std::memcpy(shared, global, bytes);
  else
    machine.running->copies.back().push_back({shared, global, bytes});
}
void commit_copies() { machine.running->copies.emplace_back(); }
void wait_for_copies(int groups) {
  auto& copies = machine.running->copies;
  for (; copies.size() > static_cast<size_t>(groups) + 1; copies.pop_front())
    for (const PendingCopy& copy : copies.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

void wait_for_block() {
  Block& block = *machine.running->block;
  block.at_barrier.push_back(machine.running);
  if (block.at_barrier.size() == machine.config.blockDim.x) {
    for (Thread* thread : block.at_barrier) block.wake(thread);
    block.at_barrier.clear();
  }
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
    warp.runnable.insert(warp.runnable.end(), warp.waiting.begin(), warp.waiting.end());
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
  machine.schedule = {};
  std::vector<std::unique_ptr<Block>> resident;
  size_t present = 0;
  while (!order.empty() || !resident.empty()) {
    while (!order.empty() && resident.size() < static_cast<size_t>(settings().resident_blocks)) {
      resident.push_back(start_block(order.back()));
      order.pop_back();
    }
    change_schedule();
    present = draw(resident.size(), machine.schedule.blocks, present, machine.schedule.avoided_block,
                   [](size_t) { return true; });
    Block& block = *resident[present];
    check_progress(block);
    resume(next_thread(block));
    if (block.finished == config.blockDim.x) {
      std::swap(resident[present], resident.back());
      resident.pop_back();
    }
  }
  return cudaSuccess;
}

}  // namespace emulator
