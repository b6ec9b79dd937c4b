// Work that must not slow a decode step: reading an adapter file, copying it to its place. Done by a thread of its own
// in the idle scheduling class, so it takes only cycles nobody else wants; it holds no lock of Python's, so that nobody
// waits for it while it is starved.

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
  const char *path;  // read this file, or
  const char *from;  // copy these bytes
  char *to;
  int64_t size;
  uint64_t sum;   // out: XXH64 of the bytes
  int64_t error;  // out: 0, or errno; a file of another size is EIO
} background_job;

// XXH64 with seed 0 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md): finds damage, proves no origin.
#define P1 0x9E3779B185EBCA87ull
#define P2 0xC2B2AE3D27D4EB4Full
#define P3 0x165667B19E3779F9ull
#define P4 0x85EBCA77C2B2AE63ull
#define P5 0x27D4EB2F165667C5ull

static inline uint64_t rotl(uint64_t v, int bits) { return (v << bits) | (v >> (64 - bits)); }
static inline uint64_t load64(const char *p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}
static inline uint64_t xxh_round(uint64_t lane, uint64_t input) { return rotl(lane + input * P2, 31) * P1; }

static void xxh_stripes(uint64_t lanes[4], const char *p, int64_t size) {  // size: a multiple of 32
  for (const char *end = p + size; p < end; p += 32)
    for (int i = 0; i < 4; i++) lanes[i] = xxh_round(lanes[i], load64(p + 8 * i));
}
static uint64_t xxh_end(const uint64_t lanes[4], const char *p, int64_t left, int64_t size) {
  uint64_t h = P5;
  if (size >= 32) {
    h = rotl(lanes[0], 1) + rotl(lanes[1], 7) + rotl(lanes[2], 12) + rotl(lanes[3], 18);
    for (int i = 0; i < 4; i++) h = (h ^ xxh_round(0, lanes[i])) * P1 + P4;
  }
  h += (uint64_t)size;
  for (; left >= 8; left -= 8, p += 8) h = rotl(h ^ xxh_round(0, load64(p)), 27) * P1 + P4;
  if (left >= 4) {
    uint32_t word;
    memcpy(&word, p, 4);
    h = rotl(h ^ (uint64_t)word * P1, 23) * P2 + P3;
    left -= 4, p += 4;
  }
  for (; left > 0; left--) h = rotl(h ^ (uint64_t)(uint8_t)*p++ * P5, 11) * P1;
  h = (h ^ (h >> 33)) * P2;
  h = (h ^ (h >> 29)) * P3;
  return h ^ (h >> 32);
}

#define CHUNK (256 * 1024)  // summed while it is still in the cache

static int64_t fetch(int fd, const background_job *job, int64_t at, int64_t count) {  // 0, or errno
  if (fd < 0) {
    if (job->to != job->from) memcpy(job->to + at, job->from + at, count);
    return 0;
  }
  for (int64_t end = at + count; at < end;) {
    ssize_t got = pread(fd, job->to + at, end - at, at);
    if (got == 0) return EIO;
    if (got > 0) at += got;
    else if (errno != EINTR) return errno;
  }
  return 0;
}

static int64_t move_and_sum(int fd, background_job *job) {
  uint64_t lanes[4] = {P1 + P2, P2, 0, 0 - P1};
  int64_t whole = job->size / 32 * 32;
  for (int64_t at = 0; at < job->size; at += CHUNK) {
    int64_t count = MIN((int64_t)CHUNK, job->size - at), error = fetch(fd, job, at, count);
    if (error) return error;
    if (at < whole) xxh_stripes(lanes, job->to + at, MIN(count, whole - at));
  }
  job->sum = xxh_end(lanes, job->to + whole, job->size - whole, job->size);
  return 0;
}

static int64_t read_file(background_job *job) {
  struct stat status;
  int fd = open(job->path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno;
  int64_t error = fstat(fd, &status) ? errno : status.st_size != job->size ? EIO : 0;
  if (!error) error = move_and_sum(fd, job);
  close(fd);
  return error;
}

static void *do_job(void *argument) {
  background_job *job = argument;
#if defined(SCHED_IDLE)
  sched_setscheduler(0, SCHED_IDLE, &(struct sched_param){0});  // refused in some sandboxes: then merely less polite
#endif
  job->error = job->path ? read_file(job) : move_and_sum(-1, job);
  return NULL;
}

void ml_background(background_job *job) {  // returns when the job is done
  pthread_t thread;
  job->error = pthread_create(&thread, NULL, do_job, job);
  if (!job->error) pthread_join(thread, NULL);
}
