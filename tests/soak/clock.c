/* The wall clock, ahead by the seconds (int64) in the file $SOAK_CLOCK, for processes with
   LD_PRELOAD=clock.so. The monotonic clock and the times of files stay, as when NTP sets a clock.
   Waits until a time of that clock reach the kernel, which has another, by its own time. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>

static volatile int64_t *ahead;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void open_clock(void) {
  real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  const char *path = getenv("SOAK_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
  if (page != MAP_FAILED) ahead = page;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  if (!real) open_clock();
  int failed = real(clock, now);
  int wall = clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE;
  if (!failed && wall && ahead) now->tv_sec += *ahead;
  return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec exact;
  int failed = clock_gettime(CLOCK_REALTIME, &exact);
  if (!failed) *now = (struct timeval){exact.tv_sec, exact.tv_nsec / 1000};
  return failed;
}

time_t time(time_t *now) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (now) *now = exact.tv_sec;
  return exact.tv_sec;
}

/* A time of the wall clock; one of the monotonic clock is decades smaller, and stays. */
static struct timespec of_kernel(const struct timespec *until) {
  struct timespec kernel = *until;
  if (ahead && until->tv_sec > 1000000000) kernel.tv_sec -= *ahead;
  return kernel;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
  static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
  if (!wait) wait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
  struct timespec kernel = of_kernel(until);
  return wait(condition, mutex, &kernel);
}

long syscall(long number, ...) { /* as the futexes of Abseil's mutexes */
  static long (*call)(long, ...);
  if (!call) call = dlsym(RTLD_NEXT, "syscall");
  long a[6];
  va_list given;
  va_start(given, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(given, long);
  va_end(given);
  struct timespec kernel;
  if (number == SYS_futex && a[1] & FUTEX_CLOCK_REALTIME && a[3]) {
    kernel = of_kernel((const struct timespec *)a[3]);
    a[3] = (long)&kernel;
  }
  return call(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
