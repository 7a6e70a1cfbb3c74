/*
Fibers, warps, blocks and grids; see device.h.
*/
#include "device.h"

#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>

#include <mutex>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

/* Saves the callee-saved registers and the stack pointer, and goes on where `to` was saved. */
extern "C" void moectl_emulate_switch(void **save, void *to);
asm(R"(
.text
.globl moectl_emulate_switch
.hidden moectl_emulate_switch
.type moectl_emulate_switch, @function
moectl_emulate_switch:
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
.size moectl_emulate_switch, .-moectl_emulate_switch
)");

namespace emulate {

uint8_t *shared_memory;
unsigned shared_memory_bytes;
Lane *self;
int lane_id;

namespace {

constexpr int MAX_THREADS = 1024;
constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 64 * 1024;
/* More than any GPU's shared memory per block. */
constexpr size_t SHARED_BYTES = 256 * 1024;
constexpr size_t PAGE = 4096;

struct Copy {
  void *to;
  const void *from;
  bool valid;
  unsigned group;
};

struct Fiber {
  void *stack_pointer;
  uint3 index;
  int warp;
  int lane;
  unsigned group; /* cp.async groups committed so far */
  std::vector<Copy> copies;
  /* Where it waits, for messages and checks. */
  const char *name;
  const char *file;
  int line;
  uint32_t mask;
  Combine *combine;
};

struct Warp {
  uint32_t alive;
  uint32_t runnable;
  uint32_t waiting; /* at a warp function */
  Lane lanes[WARP];
};

Fiber fibers[MAX_THREADS];
Warp warps[MAX_THREADS / WARP];
Fiber *current;
int num_threads, num_warps;
int alive; /* threads */
uint32_t runnable_warps;
bool reverse, trace;

int arrived; /* at the block's barrier */
int barrier_sum, barrier_result;
Fiber *first_arrived;

/* Barriers among some of the block's threads, by id. */
struct GroupBarrier {
  int arrived;
  uint32_t waiting[MAX_THREADS / WARP]; /* lanes, by warp */
} group_barriers[16];

const char *kernel_name = "(none)";
void (*kernel_entry)(void *);
void *kernel_argument;
void *launcher; /* stack pointer of run() */
uint8_t *stacks, *shared_end;

uint8_t *map(size_t bytes) {
  void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail(__FILE__, __LINE__, "cannot map %zu bytes for the emulator", bytes);
  return (uint8_t *)p;
}

/* Stacks and shared memory, each with a page without access: below a stack, after shared memory. */
void allocate() {
  stacks = map(MAX_THREADS * (STACK_BYTES + PAGE));
  for (int i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * (STACK_BYTES + PAGE), PAGE, PROT_NONE);
  uint8_t *shared = map(SHARED_BYTES + PAGE);
  shared_end = shared + SHARED_BYTES;
  mprotect(shared_end, PAGE, PROT_NONE);
}

void set_runnable(int warp, uint32_t lanes) {
  warps[warp].runnable |= lanes;
  runnable_warps |= 1u << warp;
}

/* From `mask`, the next bit after `from`, in the order that lanes and warps run. */
int next_bit(uint32_t mask, int from) {
  if (reverse) {
    uint32_t below = mask & ((1u << from) - 1);
    return 31 - __builtin_clz(below ? below : mask);
  }
  uint32_t above = mask & ~(((2u << from) - 1));
  return __builtin_ctz(above ? above : mask);
}

[[noreturn]] void deadlock() {
  fprintf(stderr, "kernel %s, block (%u, %u, %u): threads wait for others that never come\n", kernel_name,
          blockIdx.x, blockIdx.y, blockIdx.z);
  /* One line for each run of threads that wait at the same place. */
  for (int i = 0, end; i < num_threads; i = end) {
    auto lives = [](int i) { return warps[i / WARP].alive >> (i % WARP) & 1; };
    const Fiber &f = fibers[i];
    end = i + 1;
    while (end < num_threads && lives(end) == lives(i) &&
           (!lives(i) || (fibers[end].file == f.file && fibers[end].line == f.line && fibers[end].mask == f.mask)))
      end++;
    if (!lives(i))
      fprintf(stderr, "  threads %d..%d: exited\n", i, end - 1);
    else
      fprintf(stderr, "  threads %d..%d: %s:%d, %s, mask %08x\n", i, end - 1, f.file, f.line, f.name, f.mask);
  }
  abort();
}

/* Runs another thread of the block until the caller's turn comes again. */
void yield() {
  Fiber *from = current;
  void *to;
  uint32_t lanes = warps[from->warp].runnable;
  int warp = from->warp;
  if (!lanes) {
    runnable_warps &= ~(1u << warp);
    if (runnable_warps) {
      warp = next_bit(runnable_warps, warp);
      lanes = warps[warp].runnable;
    }
  }
  if (lanes) {
    int lane = next_bit(lanes, from->lane);
    warps[warp].runnable &= ~(1u << lane);
    Fiber *next = &fibers[warp * WARP + lane];
    current = next;
    threadIdx = next->index;
    lane_id = lane;
    self = &warps[warp].lanes[lane];
    if (next == from) return;
    to = next->stack_pointer;
  } else if (alive == 0) {
    to = launcher;
  } else {
    deadlock();
  }
  moectl_emulate_switch(&from->stack_pointer, to);
}

/* If all lanes that `fiber` waits for wait with it, combines their values and lets them go on. */
bool complete(const Fiber &fiber) {
  Warp &warp = warps[fiber.warp];
  uint32_t group = fiber.mask & warp.alive;
  if ((warp.waiting & group) != group) return false;
  for (uint32_t rest = group; rest; rest &= rest - 1) {
    const Fiber &other = fibers[fiber.warp * WARP + __builtin_ctz(rest)];
    if (other.mask != fiber.mask) return false;
    if (other.combine != fiber.combine || other.line != fiber.line || strcmp(other.name, fiber.name))
      fail(fiber.file, fiber.line, "%s meets %s at %s:%d (lane %d) in one warp", fiber.name, other.name,
           other.file, other.line, other.lane);
  }
  if (fiber.combine) fiber.combine(warp.lanes, group);
  warp.waiting &= ~group;
  set_runnable(fiber.warp, group);
  return true;
}

void release_barrier() {
  barrier_result = barrier_sum;
  barrier_sum = arrived = 0;
  for (int w = 0; w < num_warps; w++)
    if (warps[w].alive) set_runnable(w, warps[w].alive);
}

[[noreturn]] void thread_main() {
  kernel_entry(kernel_argument);
  /* Others may have waited for this one only. */
  Warp &warp = warps[current->warp];
  warp.alive &= ~(1u << current->lane);
  alive--;
  for (uint32_t rest = warp.waiting; rest; rest = rest & (rest - 1) & warp.waiting)
    complete(fibers[current->warp * WARP + __builtin_ctz(rest)]);
  if (arrived && arrived == alive) release_barrier();
  yield();
  abort(); /* an exited thread's turn never comes */
}

void run_block() {
  alive = num_threads;
  arrived = barrier_sum = 0;
  memset(group_barriers, 0, sizeof group_barriers);
  runnable_warps = 0;
  for (int w = 0; w < num_warps; w++) {
    int lanes = num_threads - w * WARP;
    warps[w].alive = lanes >= WARP ? 0xffffffffu : (1u << lanes) - 1;
    warps[w].runnable = warps[w].waiting = 0;
    set_runnable(w, warps[w].alive);
  }
  for (int i = 0; i < num_threads; i++) {
    Fiber &f = fibers[i];
    /* Six registers and the address that moectl_emulate_switch returns to; the ABI wants the stack
       8 bytes off a multiple of 16 there. */
    void **top = (void **)(stacks + (i + 1) * (STACK_BYTES + PAGE));
    top[-2] = (void *)thread_main;
    for (int r = 3; r <= 8; r++) top[-r] = nullptr;
    f.stack_pointer = top - 8;
    f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    f.warp = i / WARP;
    f.lane = i % WARP;
    f.group = 0;
    f.copies.clear();
  }
  int first = reverse ? num_threads - 1 : 0;
  warps[first / WARP].runnable &= ~(1u << first % WARP);
  current = &fibers[first];
  threadIdx = current->index;
  lane_id = current->lane;
  self = &warps[current->warp].lanes[lane_id];
  moectl_emulate_switch(&launcher, current->stack_pointer);
}

}  // namespace

void fail(const char *file, int line, const char *format, ...) {
  fprintf(stderr, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u), %s:%d: ", kernel_name, blockIdx.x,
          blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, file, line);
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fprintf(stderr, "\n");
  abort();
}

void collective(Combine *combine, uint32_t mask, const char *name, const char *file, int line) {
  Fiber &fiber = *current;
  Warp &warp = warps[fiber.warp];
  if (!(mask >> fiber.lane & 1)) fail(file, line, "%s: the mask %08x lacks lane %d", name, mask, fiber.lane);
  fiber.combine = combine;
  fiber.mask = mask;
  fiber.name = name;
  fiber.file = file;
  fiber.line = line;
  warp.waiting |= 1u << fiber.lane;
  if (complete(fiber))
    warp.runnable &= ~(1u << fiber.lane); /* goes on at once */
  else
    yield();
}

int barrier(int value, const char *name, const char *file, int line) {
  Fiber &fiber = *current;
  fiber.mask = 0xffffffffu;
  fiber.name = name;
  fiber.file = file;
  fiber.line = line;
  if (arrived == 0) {
    first_arrived = &fiber;
  } else if (first_arrived->line != line || strcmp(first_arrived->name, name)) {
    fail(file, line, "%s meets %s at %s:%d (thread %d) in one block", name, first_arrived->name,
         first_arrived->file, first_arrived->line, (int)(first_arrived - fibers));
  }
  arrived++;
  barrier_sum += value;
  if (arrived == alive) {
    release_barrier();
    warps[fiber.warp].runnable &= ~(1u << fiber.lane);
  } else {
    yield();
  }
  return barrier_result;
}

void group_barrier(int id, int threads, const char *file, int line) {
  Fiber &fiber = *current;
  if (id < 1 || id > 15 || threads % WARP || threads > num_threads)
    fail(file, line, "group_sync: barrier %d of %d threads in a block of %d", id, threads, num_threads);
  fiber.mask = 0xffffffffu;
  fiber.name = "group_sync";
  fiber.file = file;
  fiber.line = line;
  GroupBarrier &barrier = group_barriers[id];
  barrier.waiting[fiber.warp] |= 1u << fiber.lane;
  if (++barrier.arrived < threads) return yield();
  for (int w = 0; w < num_warps; w++)
    if (barrier.waiting[w]) set_runnable(w, barrier.waiting[w]);
  barrier = {};
  warps[fiber.warp].runnable &= ~(1u << fiber.lane);
}

void cp_async(void *to, const void *from, bool valid) {
  memset(to, 0xCD, 16);
  current->copies.push_back({to, from, valid, current->group});
}
void cp_async_commit() { current->group++; }
void cp_async_wait(int groups_under_way) {
  std::vector<Copy> &copies = current->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group + groups_under_way < current->group; done++) {
    if (copies[done].valid)
      memcpy(copies[done].to, copies[done].from, 16);
    else
      memset(copies[done].to, 0, 16);
  }
  copies.erase(copies.begin(), copies.begin() + done);
}

void run(const char *kernel, void (*entry)(void *), void *argument, dim3 grid, dim3 block,
         unsigned smem_bytes) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  kernel_name = kernel;
  kernel_entry = entry;
  kernel_argument = argument;
  gridDim = grid;
  blockDim = block;
  blockIdx = threadIdx = {0, 0, 0};
  if (!stacks) {
    const char *value = getenv("MOECTL_EMULATE_REVERSE");
    reverse = value && strcmp(value, "0");
    value = getenv("MOECTL_EMULATE_TRACE");
    trace = value && strcmp(value, "0");
    allocate();
  }
  if (trace)
    fprintf(stderr, "%s grid (%u, %u, %u) block (%u, %u, %u) smem %u\n", kernel, grid.x, grid.y, grid.z, block.x,
            block.y, block.z, smem_bytes);
  uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (threads == 0 || threads > MAX_THREADS)
    fail(__FILE__, __LINE__, "%llu threads in a block, expected 1 to %d", (unsigned long long)threads, MAX_THREADS);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail(__FILE__, __LINE__, "grid (%u, %u, %u), expected 1 to 2^31 - 1, 65535, 65535", grid.x, grid.y, grid.z);
  /* The most that any of our GPUs has. */
  if (smem_bytes > 227 * 1024)
    fail(__FILE__, __LINE__, "%u bytes of shared memory, expected at most %d", smem_bytes, 227 * 1024);
  num_threads = (int)threads;
  num_warps = (num_threads + WARP - 1) / WARP;
  size_t rounded = (smem_bytes + 15) / 16 * 16;
  shared_memory = shared_end - rounded;
  shared_memory_bytes = smem_bytes;
  uint64_t num_blocks = (uint64_t)grid.x * grid.y * grid.z;
  for (uint64_t i = 0; i < num_blocks; i++) {
    uint64_t b = reverse ? num_blocks - 1 - i : i;
    blockIdx = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
    memset(shared_memory, 0xCD, rounded);
    run_block();
  }
}

/* ---- by name ---- */

namespace {
struct Kernel {
  const char *name;
  Export::Entry *entry;
  const unsigned *sizes;
  int num_params;
};
/* A function's static, because exports of other files may come before this file's globals. */
std::vector<Kernel> &kernels() {
  static std::vector<Kernel> list;
  return list;
}
const Kernel *find(const char *name) {
  for (const Kernel &k : kernels())
    if (!strcmp(k.name, name)) return &k;
  return nullptr;
}
}  // namespace

void Export::add(const char *name, Entry *entry, const unsigned *sizes, int num_params) {
  if (find(name)) fail(__FILE__, __LINE__, "two kernels are named %s", name);
  kernels().push_back({name, entry, sizes, num_params});
}

}  // namespace emulate

int moectl_emulate_launch(const char *kernel, const unsigned grid[3], const unsigned block[3],
                          unsigned smem_bytes, void **params) {
  const emulate::Kernel *k = emulate::find(kernel);
  if (!k) return 1;
  emulate::run(k->name, k->entry, params, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
               smem_bytes);
  return 0;
}

int moectl_emulate_params(const char *kernel, unsigned *sizes, int max) {
  const emulate::Kernel *k = emulate::find(kernel);
  if (!k) return -1;
  for (int i = 0; i < k->num_params && i < max; i++) sizes[i] = k->sizes[i];
  return k->num_params;
}

const char *moectl_emulate_kernel(int i) {
  return i >= 0 && i < (int)emulate::kernels().size() ? emulate::kernels()[i].name : nullptr;
}
