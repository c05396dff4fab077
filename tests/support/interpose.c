/* Preloaded into the ranks of fault tests: system calls on files whose path holds a fragment fail, once that is asked for.
   Real calls through the real C library, so that Rust (safetensors), C++ and Python are hit alike. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static volatile int failing_with = 0;
static char wanted[512];

/* 0 ends it. */
void moe_dist_fail_files(int error, const char *fragment) {
    failing_with = 0;
    strncpy(wanted, fragment, sizeof wanted - 1);
    failing_with = error;
}

static int fails(int fd) {
    char link[64], path[4096];
    if (!failing_with) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, wanted)) return 0;
    errno = failing_with;
    return 1;
}

#define FAIL_OR(call) if (fails(fd)) return -1; return call
ssize_t write(int fd, const void *buffer, size_t count) { FAIL_OR(syscall(SYS_write, fd, buffer, count)); }
ssize_t read(int fd, void *buffer, size_t count) { FAIL_OR(syscall(SYS_read, fd, buffer, count)); }
ssize_t writev(int fd, const struct iovec *parts, int count) { FAIL_OR(syscall(SYS_writev, fd, parts, count)); }
ssize_t pread(int fd, void *buffer, size_t count, off_t at) { FAIL_OR(syscall(SYS_pread64, fd, buffer, count, at)); }
ssize_t pread64(int fd, void *buffer, size_t count, off_t at) { FAIL_OR(syscall(SYS_pread64, fd, buffer, count, at)); }
ssize_t pwrite(int fd, const void *buffer, size_t count, off_t at) { FAIL_OR(syscall(SYS_pwrite64, fd, buffer, count, at)); }
ssize_t pwrite64(int fd, const void *buffer, size_t count, off_t at) { FAIL_OR(syscall(SYS_pwrite64, fd, buffer, count, at)); }
int fsync(int fd) { FAIL_OR((int)syscall(SYS_fsync, fd)); }
