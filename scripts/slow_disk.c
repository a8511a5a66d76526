/* Preloaded into a program, makes its writes to files as slow as a disk of SLOW_DISK_RATE bytes a
 * second: all threads together, at the call that writes, where a full page cache makes them wait.
 * SLOW_DISK_COUNT names a file that holds the bytes that were slowed, to show that any were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static double rate;
static double due;
static uint64_t *count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void begin(void) {
    const char *text = getenv("SLOW_DISK_RATE"), *path = getenv("SLOW_DISK_COUNT");
    if (!text || !path) return;
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof *count)) abort();
    count = mmap(NULL, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (count == MAP_FAILED) abort();
    close(fd);
    rate = atof(text);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* The disk is busy for as long as these bytes take; the caller waits until they are through. */
static void slow(size_t length) {
    if (rate <= 0) return;
    pthread_mutex_lock(&lock);
    double begun = now();
    due = (due > begun ? due : begun) + length / rate;
    double wait = due - begun;
    *count += length;
    pthread_mutex_unlock(&lock);
    struct timespec pause = {(time_t)wait, (long)((wait - (time_t)wait) * 1e9)};
    nanosleep(&pause, NULL);
}

static size_t sum(const struct iovec *parts, int n) {
    size_t length = 0;
    for (int i = 0; i < n; i++) length += parts[i].iov_len;
    return length;
}

#define CALL(name, length, arguments, ...)                          \
    ssize_t name arguments {                                        \
        static ssize_t(*real) arguments;                            \
        if (!real) real = (ssize_t(*) arguments)dlsym(RTLD_NEXT, #name); \
        slow(length);                                               \
        return real(__VA_ARGS__);                                   \
    }

CALL(pwrite, n, (int fd, const void *buf, size_t n, off_t at), fd, buf, n, at)
CALL(pwrite64, n, (int fd, const void *buf, size_t n, off64_t at), fd, buf, n, at)
CALL(pwritev, sum(v, n), (int fd, const struct iovec *v, int n, off_t at), fd, v, n, at)
CALL(pwritev64, sum(v, n), (int fd, const struct iovec *v, int n, off64_t at), fd, v, n, at)
