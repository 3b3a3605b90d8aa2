/* The part of libaio that DeepSpeed's async_io calls, for machines without the package libaio-dev.
 *
 * Written for these tests from the manual pages io_setup(2) to io_pgetevents(2). The structures are
 * the kernel's own. As in libaio, a function returns a negative errno where it fails. */
#ifndef LIBAIO_H
#define LIBAIO_H

#include <linux/aio_abi.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef aio_context_t io_context_t;

int io_queue_init(int most_events, io_context_t *context);
int io_queue_release(io_context_t context);
int io_submit(io_context_t context, long count, struct iocb **requests);
int io_pgetevents(io_context_t context, long least, long most, struct io_event *events,
                  struct timespec *timeout, sigset_t *mask);

static inline void io_prepare(struct iocb *request, int code, int file, void *buffer, size_t bytes,
                              long long offset)
{
    memset(request, 0, sizeof *request);
    request->aio_lio_opcode = (uint16_t)code;
    request->aio_fildes = (uint32_t)file;
    request->aio_buf = (uint64_t)(uintptr_t)buffer;
    request->aio_nbytes = bytes;
    request->aio_offset = offset;
}

static inline void io_prep_pread(struct iocb *request, int file, void *buffer, size_t bytes,
                                 long long offset)
{
    io_prepare(request, IOCB_CMD_PREAD, file, buffer, bytes, offset);
}

static inline void io_prep_pwrite(struct iocb *request, int file, void *buffer, size_t bytes,
                                  long long offset)
{
    io_prepare(request, IOCB_CMD_PWRITE, file, buffer, bytes, offset);
}

#ifdef __cplusplus
}
#endif

#endif
