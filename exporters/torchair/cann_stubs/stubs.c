/*
 * An Ascend NPU on host memory: the part of CANN's C interface that torch-npu calls while a model is traced.
 *
 * Memory, streams, events and copies work. Kernels do not exist: running one is an error that says so.
 * build.py adds, for every other symbol that the installed torch-npu wants of CANN, a function that returns 0 (success).
 * That is a lie for any function with an output parameter: the caller reads what was there before. Functions of that kind
 * which importing, opening the device, allocating, copying or tracing reach are therefore all written out below.
 *
 * Signatures follow CANN's acl_rt.h, acl_base.h, acl_op_compiler.h and securec.h. 64-bit, any architecture, Linux.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <search.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_PARAMETER = 100000, BAD_ALLOCATION = 200000, FEATURE_UNSUPPORTED = 200006 };

/* How our code tells this device from a real one, whatever else is installed: no library of CANN exports it. */
const int qwen2vl_tc_emulated_npu = 1;

/* ---- the device --------------------------------------------------------------------------------------------------- */

static char soc_name[64] = "Ascend910B2";
static __thread int current_device = 0;
static long context[8];

/* Returns 0 and changes nothing when the name is too long. To be called before torch-npu asks for the name. */
int qwen2vl_tc_set_soc_name(const char *name) {
  if (strlen(name) >= sizeof soc_name) return 0;
  strcpy(soc_name, name);
  return 1;
}

const char *aclrtGetSocName(void) { return soc_name; }
int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return SUCCESS; }
int aclrtSetDevice(int device) { current_device = device; return SUCCESS; }
int aclrtGetDevice(int *device) { *device = current_device; return SUCCESS; }
int aclrtGetCurrentContext(void **current) { *current = context; return SUCCESS; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = 0; return SUCCESS; }
int aclrtDeviceGetBareTgid(int32_t *pid) { *pid = (int32_t)getpid(); return SUCCESS; }
int aclrtDeviceGetUuid(int32_t device, void *uuid) { memset(uuid, 0, 16); return SUCCESS; }
/* Core counts and the like: 0, because a number would be taken for a measured one. */
int aclGetDeviceCapability(uint32_t device, int kind, int64_t *value) { *value = 0; return SUCCESS; }
int aclrtGetDeviceInfo(uint32_t device, int kind, int64_t *value) { *value = 0; return SUCCESS; }
int aclGetCannAttribute(int attribute, int32_t *value) { *value = 0; return SUCCESS; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return SUCCESS; }
/* torch-npu allocates this many bytes for the answer, and refuses 0 */
size_t aclGetCompileoptSize(int option) { return 64; }
int aclGetCompileopt(int option, char *value, size_t length) {
  snprintf(value, length, "disable");
  return SUCCESS;
}

/* ---- memory ------------------------------------------------------------------------------------------------------- */

struct block {
  void *address;
  size_t bytes;
};
static void *blocks = NULL;
static pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;

static int by_address(const void *left, const void *right) {
  uintptr_t a = (uintptr_t)((const struct block *)left)->address, b = (uintptr_t)((const struct block *)right)->address;
  return (a > b) - (a < b);
}

/* NORESERVE: the parameters of a 72B model cost no memory until one of their pages is touched. */
static int take(void **address, size_t bytes) {
  struct block *block = malloc(sizeof *block);
  if (!block) return BAD_ALLOCATION;
  block->bytes = bytes ? bytes : 1;
  block->address =
      mmap(NULL, block->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (block->address == MAP_FAILED) {
    free(block);
    return BAD_ALLOCATION;
  }
  pthread_mutex_lock(&blocks_lock);
  void *kept = tsearch(block, &blocks, by_address);
  pthread_mutex_unlock(&blocks_lock);
  if (!kept) {
    munmap(block->address, block->bytes);
    free(block);
    return BAD_ALLOCATION;
  }
  *address = block->address;
  return SUCCESS;
}

static int give_back(void *address) {
  struct block key = {address, 0}, *block = NULL;
  pthread_mutex_lock(&blocks_lock);
  void *found = tfind(&key, &blocks, by_address);
  if (found) {
    block = *(struct block **)found;
    tdelete(&key, &blocks, by_address);
  }
  pthread_mutex_unlock(&blocks_lock);
  if (!block) return INVALID_PARAMETER;
  munmap(block->address, block->bytes);
  free(block);
  return SUCCESS;
}

int aclrtMalloc(void **address, size_t bytes, int policy) { return take(address, bytes); }
int aclrtMallocAlign32(void **address, size_t bytes, int policy) { return take(address, bytes); }
int aclrtFree(void *address) { return give_back(address); }
int aclrtMallocHost(void **address, size_t bytes) { return take(address, bytes); }
int aclrtMallocHostWithCfg(void **address, uint64_t bytes, void *config) { return take(address, bytes); }
int aclrtFreeHost(void *address) { return give_back(address); }
/* Expandable segments reserve addresses and map physical memory into them: reserving is enough, the pages are there. */
int aclrtReserveMemAddress(void **address, size_t bytes, size_t alignment, void *expected, uint64_t flags) {
  return take(address, bytes);
}
int aclrtReleaseMemAddress(void *address) { return give_back(address); }
/* A 64 GB card: what torch-npu may believe, not what this machine has. */
int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total_bytes) {
  *free_bytes = (size_t)60 << 30;
  *total_bytes = (size_t)64 << 30;
  return SUCCESS;
}

static int copy(void *to, size_t room, const void *from, size_t bytes) {
  if (bytes > room) return INVALID_PARAMETER;
  memcpy(to, from, bytes);
  return SUCCESS;
}
static int fill(void *to, size_t room, int value, size_t bytes) {
  if (bytes > room) return INVALID_PARAMETER;
  memset(to, value, bytes);
  return SUCCESS;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) { return copy(to, room, from, bytes); }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
  return copy(to, room, from, bytes);
}
int aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
  return copy(to, room, from, bytes);
}
int aclrtMemset(void *to, size_t room, int value, size_t bytes) { return fill(to, room, value, bytes); }
int aclrtMemsetAsync(void *to, size_t room, int value, size_t bytes, void *stream) {
  return fill(to, room, value, bytes);
}

/* ---- streams and events: everything is done when the call returns ---------------------------------------------------- */

static int new_handle(void **handle) {
  *handle = malloc(1);
  return *handle ? SUCCESS : BAD_ALLOCATION;
}
static int end_handle(void *handle) {
  free(handle);
  return SUCCESS;
}
static int complete(int *status) {
  *status = 1;
  return SUCCESS;
}
int aclrtCreateStream(void **stream) { return new_handle(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return new_handle(stream); }
int aclrtDestroyStream(void *stream) { return end_handle(stream); }
int aclrtDestroyStreamForce(void *stream) { return end_handle(stream); }
int aclrtStreamQuery(void *stream, int *status) { return complete(status); }
int aclrtStreamGetId(void *stream, int32_t *id) { *id = 0; return SUCCESS; }
int aclmdlRICaptureGetInfo(void *stream, int *status, void **model) { *status = 0; *model = NULL; return SUCCESS; }
int aclrtCreateEventWithFlag(void **event, uint32_t flags) { return new_handle(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) { return new_handle(event); }
int aclrtDestroyEvent(void *event) { return end_handle(event); }
int aclrtQueryEventStatus(void *event, int *status) { return complete(status); }
int aclrtQueryEventWaitStatus(void *event, int *status) { return complete(status); }
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 0; return SUCCESS; }

/* ---- kernels: none. Success without a result would let wrong numbers through silently. --------------------------------- */

static const char *no_kernels =
    "this is the emulated NPU of qwen2vl-tc: it traces graphs and runs no kernels. Compute on the CPU and copy contiguous tensors.";

const char *aclGetRecentErrMsg(void) { return no_kernels; }
int aclopCompileAndExecute(const char *type) { return FEATURE_UNSUPPORTED; }
int aclopCompileAndExecuteV2(const char *type) { return FEATURE_UNSUPPORTED; }

/* ---- bounds-checked C functions that CANN's libraries bring along: these must do their work --------------------------- */

int strcpy_s(char *to, size_t room, const char *from) {
  if (!to || !from || strlen(from) >= room) return 1;
  strcpy(to, from);
  return 0;
}

int memcpy_s(void *to, size_t room, const void *from, size_t bytes) { return copy(to, room, from, bytes) != SUCCESS; }

/* count limits what is written, room what fits; -1 is the only failure */
int vsnprintf_s(char *to, size_t room, size_t count, const char *format, va_list arguments) {
  if (!to || !room) return -1;
  size_t limit = count < room ? count + 1 : room;
  int written = vsnprintf(to, limit, format, arguments);
  return written < 0 || (size_t)written >= limit ? -1 : written;
}

int snprintf_s(char *to, size_t room, size_t count, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int written = vsnprintf_s(to, room, count, format, arguments);
  va_end(arguments);
  return written;
}
