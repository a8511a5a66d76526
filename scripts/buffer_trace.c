/* Preloaded into a program, notes which addresses bytes of files and sockets were read into and
 * written from, and counts the bytes of its memcpy and memmove calls.
 *
 * BUFFER_TRACE names the file of notes: a page with the counts, then records of four words. A call
 * is noted after it has returned and before its caller can give the buffer away, so the order of
 * records is an order in which the bytes can have moved. strace cannot show this: it prints the
 * content of an iovec's parts, not their addresses. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PREAD = 1, READ, WRITE, PWRITE };
#define RECORDS (1u << 22)

struct record { uint64_t call, address, length, descriptor; };
struct notes {
    _Atomic uint64_t record_count, copy_count, copied_bytes;
    char rest_of_page[4096 - 24];
    struct record records[RECORDS];
};
static struct notes *notes;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("BUFFER_TRACE");
    if (!path) return;
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof(struct notes))) abort();
    void *at = mmap(NULL, sizeof(struct notes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) abort();
    close(fd);
    notes = at;
}

static void note(int call, int fd, const void *address, size_t length) {
    uint64_t i = atomic_fetch_add(&notes->record_count, 1);
    if (i < RECORDS) notes->records[i] = (struct record){call, (uint64_t)address, length, fd};
}

static ssize_t noted(int call, int fd, const void *address, ssize_t done) {
    int error = errno;
    if (notes && done > 0) note(call, fd, address, done);
    errno = error;
    return done;
}

static ssize_t noted_parts(int call, int fd, const struct iovec *parts, int count, ssize_t done) {
    size_t left = done > 0 ? done : 0;
    for (int i = 0; notes && i < count && left; i++) {
        size_t length = parts[i].iov_len < left ? parts[i].iov_len : left;
        if (length) note(call, fd, parts[i].iov_base, length);
        left -= length;
    }
    return done;
}

#define REAL(name) ((__typeof__(&name))real(&real_##name, #name))
static void *real(void **slot, const char *name) { return *slot ? *slot : (*slot = dlsym(RTLD_NEXT, name)); }
#define CALL(name, kind, arguments, ...)                         \
    static void *real_##name;                                    \
    ssize_t name arguments { return noted(kind, fd, buf, REAL(name)(__VA_ARGS__)); }

CALL(pread, PREAD, (int fd, void *buf, size_t n, off_t at), fd, buf, n, at)
CALL(pread64, PREAD, (int fd, void *buf, size_t n, off64_t at), fd, buf, n, at)
CALL(read, READ, (int fd, void *buf, size_t n), fd, buf, n)
CALL(recv, READ, (int fd, void *buf, size_t n, int f), fd, buf, n, f)
CALL(write, WRITE, (int fd, const void *buf, size_t n), fd, buf, n)
CALL(send, WRITE, (int fd, const void *buf, size_t n, int f), fd, buf, n, f)
CALL(pwrite, PWRITE, (int fd, const void *buf, size_t n, off_t at), fd, buf, n, at)
CALL(pwrite64, PWRITE, (int fd, const void *buf, size_t n, off64_t at), fd, buf, n, at)

#define CALL_PARTS(name, kind, arguments, parts, count, ...)     \
    static void *real_##name;                                    \
    ssize_t name arguments { return noted_parts(kind, fd, parts, count, REAL(name)(__VA_ARGS__)); }

CALL_PARTS(readv, READ, (int fd, const struct iovec *v, int n), v, n, fd, v, n)
CALL_PARTS(writev, WRITE, (int fd, const struct iovec *v, int n), v, n, fd, v, n)
CALL_PARTS(pwritev, PWRITE, (int fd, const struct iovec *v, int n, off_t at), v, n, fd, v, n, at)
CALL_PARTS(pwritev64, PWRITE, (int fd, const struct iovec *v, int n, off64_t at), v, n, fd, v, n, at)
CALL_PARTS(recvmsg, READ, (int fd, struct msghdr *m, int f), m->msg_iov, (int)m->msg_iovlen, fd, m, f)
CALL_PARTS(sendmsg, WRITE, (int fd, const struct msghdr *m, int f), m->msg_iov, (int)m->msg_iovlen, fd, m, f)

static void count(size_t n) {
    if (!notes) return;
    atomic_fetch_add_explicit(&notes->copy_count, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&notes->copied_bytes, n, memory_order_relaxed);
}

/* Written out, because a call of the real one would come back here. */
void *memcpy(void *restrict to, const void *restrict from, size_t n) {
    void *at = to;
    count(n);
    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(n)::"memory");
    return to;
}

void *memmove(void *to, const void *from, size_t n) {
    if ((uintptr_t)to - (uintptr_t)from >= n) return memcpy(to, from, n);
    count(n);
    for (unsigned char *t = to; n--;) t[n] = ((const unsigned char *)from)[n];
    return to;
}
