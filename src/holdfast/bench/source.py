# SPDX-License-Identifier: Apache-2.0
"""The source text of the C peer; see :mod:`holdfast.bench.peer`."""

SOURCE = r"""
/* What a post in C costs, and what copying pieces costs. Orders on stdin, nanoseconds on stdout.
   The card of the posts is a child that sleeps in epoll on the doorbell, like the emulated one,
   and acknowledges each burst in shared memory and through a second eventfd. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { RING = 1024, BLOCK = 64 };
struct descriptor { uint32_t control, length, src_lo, src_hi, dst_lo, dst_hi; uint64_t next; };
_Static_assert(sizeof(struct descriptor) == 32, "a descriptor has 32 bytes");

static void *shared(size_t size) {
    void *at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) exit(3);
    return at;
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void answer(uint64_t ns) {
    uint32_t word = ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns;
    if (fwrite(&word, 4, 1, stdout) != 1) exit(3);
}

static struct descriptor *ring;
static volatile uint32_t *finished;
static uint64_t posted, done;
static int bell, told;

static void card(void) {
    struct epoll_event event = {.events = EPOLLIN};
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, bell, &event)) _exit(3);
    for (;;) {
        uint64_t count;
        if (epoll_wait(epoll, &event, 1, -1) < 1) continue;
        if (read(bell, &count, 8) != 8) continue;
        *finished = (*finished + (uint32_t)count) & 0xFFFFFF;
        count = 1;
        if (write(told, &count, 8) != 8) _exit(3);
    }
}

static void start(void) {
    ring = shared(RING * sizeof *ring);
    finished = shared(4096);
    bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    told = eventfd(0, EFD_CLOEXEC);
    if (bell < 0 || told < 0) exit(3);
    pid_t child = fork();
    if (child < 0) exit(3);
    if (!child) card();
}

static void refresh(void) { done += (*finished - (uint32_t)done) & 0xFFFFFF; }

static int post(const struct descriptor *batch, uint32_t count) {
    if (count > RING - 1 - (posted - done)) {
        refresh();
        if (count > RING - 1 - (posted - done)) return -1;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t slot = (uint32_t)(posted + i) % RING, place = slot % BLOCK;
        uint32_t adjacent = place == BLOCK - 1 ? 63 : place == BLOCK - 2 ? 0 : BLOCK - 2 - place;
        struct descriptor *d = &ring[slot];
        d->length = batch[i].length;
        d->src_lo = batch[i].src_lo;
        d->src_hi = batch[i].src_hi;
        d->dst_lo = batch[i].dst_lo;
        d->dst_hi = batch[i].dst_hi;
        d->next = (uint64_t)((slot + 1) % RING) * sizeof *d;
        __atomic_store_n(&d->control, 0xAD4B0000u | adjacent << 8 | (i == count - 1 ? 0x12 : 0),
                         __ATOMIC_RELEASE);
    }
    posted += count;
    uint64_t credits = count;
    return write(bell, &credits, 8) == 8 ? 0 : -1;
}

static void posts(uint32_t descriptors, uint32_t count, uint32_t burst) {
    struct descriptor *batch = calloc(descriptors, sizeof *batch);
    uint64_t *taken = calloc(count, sizeof *taken);
    if (!batch || !taken) exit(3);
    if (!ring) start();
    for (uint32_t i = 0; i < descriptors; i++) batch[i].length = 64, batch[i].src_lo = i;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t begun = now();
        if (post(batch, descriptors)) exit(3);
        taken[i] = now() - begun;
        if ((i + 1) % burst == 0 || i + 1 == count)
            for (refresh(); done != posted; refresh()) {
                uint64_t word;
                if (read(told, &word, 8) != 8) exit(3);
            }
    }
    for (uint32_t i = 0; i < count; i++) answer(taken[i]);
    free(batch);
    free(taken);
}

static void copies(uint32_t pieces, uint64_t size, int to_card) {
    static char *host, *onboard;
    static uint64_t host_size, card_size;
    uint64_t (*table)[2] = calloc(pieces, sizeof *table), total = 0, at = 0;
    if (!table || fread(table, sizeof *table, pieces, stdin) != pieces) exit(3);
    for (uint32_t i = 0; i < pieces; i++) {
        if (table[i][0] > size || table[i][1] > size - table[i][0]) exit(2);
        total += table[i][1];
    }
    if (size != host_size || total != card_size) {
        host = shared(host_size = size), onboard = shared(card_size = total);
    }
    memset(host, to_card ? 1 : 0, size);
    memset(onboard, to_card ? 0 : 1, total);
    uint64_t begun = now();
    for (uint32_t i = 0; i < pieces; i++) {
        char *there = host + table[i][0], *here = onboard + at;
        memcpy(to_card ? here : there, to_card ? there : here, table[i][1]);
        at += table[i][1];
    }
    uint64_t taken = now() - begun;
    if (total && (to_card ? onboard[total - 1] : host[table[pieces - 1][0]]) != 1) exit(3);
    answer(taken);
    free(table);
}

int main(void) {
    char order[128];
    setvbuf(stdin, 0, _IOFBF, 1 << 16);
    while (fgets(order, sizeof order, stdin)) {
        uint32_t a, c;
        unsigned long long b;
        if (sscanf(order, "post %u %llu %u", &a, &b, &c) == 3 && a && c && b < 1000000)
            posts(a, (uint32_t)b, c);
        else if (sscanf(order, "copy %u %llu %u", &a, &b, &c) == 3 && a)
            copies(a, b, c != 0);
        else
            return 2;
        if (fflush(stdout)) return 3;
    }
    return 0;
}
"""
