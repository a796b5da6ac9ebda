// An electric fence, for LD_PRELOAD: what libc10 (the memory of CPU tensors) and libmasked_ops (scratch, kept results,
// sparse indices) allocate ends at a page that cannot be touched, or with FENCE=front begins behind one. An access that
// is off by a byte is a SIGSEGV.
//
// AddressSanitizer sees what the compiler instruments, and GCC does not instrument masked loads and stores, with which
// these kernels treat most edges. Valgrind does not know AVX-512. This is the processor's own check, at nearly full
// speed. What it does not see: reads on the other side of an allocation (writes there are found when it is freed, up to
// the border of the page), accesses that miss the guard, and memory that others allocate.
//
// All lies in one range of addresses that is never used twice, so that memory that was freed cannot be touched either:
//
//   | guard | slack data data | guard | slack data | guard | ...          one page each
//   | guard | data data slack | guard | data slack | guard | ...          FENCE=front
//
// A tensor then has the alignment of its size, not the 64 bytes that torch asks for; aligned_alloc is obeyed, and may
// leave slack at the end too. All of it is 0xff at first, which is NaN.
//
// Each living allocation is two mappings, of which a process has vm.max_map_count (65530 unless set): half as many can
// be fenced at a time. Those beyond, and those above 1 GiB, all of which would be written, are allocated as usual and
// counted in fence_missed, which tests/conftest.py shows.
#define _GNU_SOURCE
#include <errno.h>
#include <execinfo.h>
#include <link.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// Of glibc, by the names under which they are not replaced.
void* __libc_memalign(size_t alignment, size_t bytes);
void __libc_free(void* p);

enum { kPage = 4096, kSpareMappings = 8000, kLibraries = 2 };
static const size_t kRange = (size_t)8 << 40, kLargest = (size_t)1 << 30;
static const char* const kNames[kLibraries] = {"/libc10.so", "/libmasked_ops.so"};
static const char kFill = (char)0xff;

static char* range;         // null until it is there
static size_t* sizes;       // [page] of the allocation that begins there; 0: none does
static atomic_size_t used;  // pages
static atomic_long living;
static long most;  // that may live at a time
static int front;
static struct {
  atomic_uintptr_t first, last;
} libraries[kLibraries];

atomic_long fence_count, fence_missed;

static _Noreturn void die(const char* what, const void* p) {
  fprintf(stderr, "fence: %s %p\n", what, p);
  abort();
}

static int find_libraries(struct dl_phdr_info* info, size_t size, void* data) {
  (void)size, (void)data;
  for (int i = 0; i < kLibraries; ++i) {
    if (!strstr(info->dlpi_name, kNames[i])) continue;
    uintptr_t last = 0;
    for (int j = 0; j < info->dlpi_phnum; ++j) {
      if (info->dlpi_phdr[j].p_type == PT_LOAD) last = info->dlpi_phdr[j].p_vaddr + info->dlpi_phdr[j].p_memsz;
    }
    libraries[i].first = info->dlpi_addr;
    libraries[i].last = info->dlpi_addr + last;  // which makes it known
  }
  return 0;
}

static int is_fenced_library(const void* caller) {
  if (!range) return 0;
  if (!libraries[0].last || !libraries[1].last) dl_iterate_phdr(find_libraries, NULL);
  for (int i = 0; i < kLibraries; ++i) {
    if ((uintptr_t)caller >= libraries[i].first && (uintptr_t)caller < libraries[i].last) return 1;
  }
  return 0;
}

static int is_fenced(const void* p) { return range && (const char*)p >= range && (const char*)p < range + kRange; }

// Null where the fence has no room.
static void* fenced(size_t alignment, size_t bytes) {
  if (bytes == 0) return NULL;
  const size_t pages = (bytes - 1) / kPage + 1;
  if (bytes <= kLargest && ++living <= most) {
    const size_t page = atomic_fetch_add(&used, pages + 1) + 1;
    char* const first = range + page * kPage;
    if (page + pages < kRange / kPage && !mprotect(first, pages * kPage, PROT_READ | PROT_WRITE)) {
      memset(first, kFill, pages * kPage);
      sizes[page] = bytes;
      ++fence_count;
      return front ? first : first + (pages * kPage - bytes) / alignment * alignment;
    }
  }
  if (bytes <= kLargest) --living;
  ++fence_missed;
  return NULL;
}

void* aligned_alloc(size_t alignment, size_t bytes) {
  void* const p = is_fenced_library(__builtin_return_address(0)) ? fenced(alignment, bytes) : NULL;
  return p ? p : __libc_memalign(alignment, bytes);
}

int posix_memalign(void** result, size_t alignment, size_t bytes) {
  void* p = is_fenced_library(__builtin_return_address(0)) ? fenced(1, bytes) : NULL;
  if (!p) p = __libc_memalign(alignment, bytes);
  if (p) *result = p;
  return p ? 0 : ENOMEM;
}

static void check(const char* slack, const char* end) {
  for (; slack < end; ++slack) {
    if (*slack != kFill) die("written outside of its allocation:", slack);
  }
}

void free(void* p) {
  if (!is_fenced(p)) return __libc_free(p);
  const int error = errno;
  const size_t page = (size_t)((char*)p - range) / kPage, bytes = sizes[page];
  const size_t all = (bytes + kPage - 1) / kPage * kPage;
  char* const first = range + page * kPage;
  if (!bytes) die("this is freed, but no allocation:", p);
  check(first, p);
  check((char*)p + bytes, first + all);
  sizes[page] = 0;
  // Mapped anew rather than protected, so that nothing keeps it apart from the guards on both sides.
  mmap(first, all, PROT_NONE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  --living;
  errno = error;
}

// Python's faulthandler, where it is on, comes first and raises the signal again, so that the address is lost.
static void on_fault(int signal_number, siginfo_t* info, void* context) {
  (void)context;
  void* frames[16];
  const int is_ours = is_fenced(info->si_addr), raised = info->si_code <= 0;
  const char* const what = raised ? "raised again" : is_ours ? "outside of an allocation" : "not at a guard";
  fprintf(stderr, "fence: a fault, %s: %p\n", what, info->si_addr);
  backtrace_symbols_fd(frames, backtrace(frames, 16), STDERR_FILENO);  // addr2line -e LIBRARY OFFSET
  signal(signal_number, SIG_DFL);
}

__attribute__((constructor)) static void begin(void) {
  const char* const end = getenv("FENCE");
  front = end && !strcmp(end, "front");
  FILE* const file = fopen("/proc/sys/vm/max_map_count", "r");
  long mappings = 0;
  if (!file || fscanf(file, "%ld", &mappings) != 1) die("cannot read /proc/sys/vm/max_map_count", NULL);
  fclose(file);
  most = (mappings - kSpareMappings) / 2;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  sizes = mmap(NULL, kRange / kPage * sizeof *sizes, PROT_READ | PROT_WRITE, flags, -1, 0);
  char* const addresses = mmap(NULL, kRange, PROT_NONE, flags, -1, 0);
  if (sizes == MAP_FAILED || addresses == MAP_FAILED) die("no address space", NULL);
  void* frame;
  backtrace(&frame, 1);  // which loads a library at its first call
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
  sigaction(SIGSEGV, &action, NULL);
  range = addresses;
}
