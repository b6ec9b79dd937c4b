// Reading an adapter file and copying it to its place, in pieces, without Python's lock.

#include <errno.h>
#include <unistd.h>

typedef struct {
  int64_t fd;        // read this file; -1: copy `from`
  const char *from;
  char *to;
  int64_t size, done;
  uint64_t lanes[4];
  uint64_t sum;   // out, at the end: XXH64 of the bytes; of a copy nothing
  int64_t error;  // out: 0, or errno
} background_job;

// XXH64 with seed 0 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md): it finds damage; it is no signature.
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

static int64_t fetch(const background_job *job, int64_t at, int64_t end) {  // 0, or errno
  if (job->fd < 0) {
    if (job->to != job->from) memmove(job->to + at, job->from + at, end - at);  // down: what is read next stays whole
    return 0;
  }
  while (at < end) {
    ssize_t got = pread(job->fd, job->to + at, end - at, at);
    if (got == 0) return EIO;
    if (got > 0) at += got;
    else if (errno != EINTR) return errno;
  }
  return 0;
}

// Moves the next `count` bytes and, unless it is a copy, sums them while they are in the cache; count: a multiple of 32.
void ml_background(background_job *job, int64_t count) {
  static const uint64_t seeds[4] = {P1 + P2, P2, 0, 0 - P1};
  int64_t at = job->done, end = MIN(job->size, at + count), whole = job->size / 32 * 32;
  if (at == 0) memcpy(job->lanes, seeds, sizeof seeds);
  job->error = fetch(job, at, end);
  if (job->error) return;
  job->done = end;
  if (job->fd < 0 && job->to != job->from) return;  // a copy's bytes were summed when they were read
  if (at < whole) xxh_stripes(job->lanes, job->to + at, MIN(end, whole) - at);
  if (end == job->size) job->sum = xxh_end(job->lanes, job->to + whole, job->size - whole, job->size);
}
