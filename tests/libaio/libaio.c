/* The functions of libaio.h, each a system call. */
#define _GNU_SOURCE
#include "libaio.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

static int answer(long result)
{
    return result < 0 ? -errno : (int)result;
}

int io_queue_init(int most_events, io_context_t *context)
{
    *context = 0; /* the kernel takes no other value */
    return answer(syscall(SYS_io_setup, most_events, context));
}

int io_queue_release(io_context_t context)
{
    return answer(syscall(SYS_io_destroy, context));
}

int io_submit(io_context_t context, long count, struct iocb **requests)
{
    return answer(syscall(SYS_io_submit, context, count, requests));
}

int io_pgetevents(io_context_t context, long least, long most, struct io_event *events,
                  struct timespec *timeout, sigset_t *mask)
{
    struct {
        sigset_t *mask;
        size_t size;
    } signals = {mask, _NSIG / 8};
    return answer(
        syscall(SYS_io_pgetevents, context, least, most, events, timeout, mask ? &signals : 0));
}
