/* SPDX-License-Identifier: Apache-2.0 */
/* What every experiment needs of the machine: time, pages, frames, a PCI function, the card.
 *
 * The card is QEMU's "edu" (QEMU, docs/specs/edu.rst). From the doorbell to the access 100 ms of
 * guest time pass: a window wide enough to die in. It moves up to 4096 bytes between its own
 * buffer and memory, cannot be stopped, and ignores the result of the access.
 *
 * Any failure ends the program with status 3 and one line: an experiment that could not be
 * carried out has no verdict. Status 4: this kernel does not have what the strategy is made of.
 */
#ifndef MACHINE_H
#define MACHINE_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define HUGE (2ul << 20)
/* QEMU before 8.2.1 aborts on a transfer that ends where the card's buffer ends. */
#define LENGTH (PAGE - 8)
#define WORDS (LENGTH / 4)
/* edu.c: timer_mod(..., milliseconds now + 100). The clock is cut to milliseconds: 1 ms of slack. */
#define WINDOW_MS 99.0

#define MUST(call) must((long)(call), #call)

static long must(long result, const char *what)
{
	if (result == -1) {
		fprintf(stderr, "%s: %s\n", what, strerror(errno));
		exit(3);
	}
	return result;
}

static void lacking(const char *what)
{
	fprintf(stderr, "this kernel has no %s: %s\n", what, strerror(errno));
	exit(4);
}

static double now(void)
{
	struct timespec t;
	MUST(clock_gettime(CLOCK_MONOTONIC, &t));
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void nap(void)
{
	struct timespec half_ms = {0, 500000};
	nanosleep(&half_ms, NULL);
}

/* -- memory ------------------------------------------------------------ */

/* Private memory in ordinary 4 KiB pages, none of it present yet. */
static char *private_memory(size_t size)
{
	char *m = (char *)MUST(mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
	m = (char *)(((uintptr_t)m + HUGE - 1) & ~(HUGE - 1));
	MUST(madvise(m, size, MADV_NOHUGEPAGE));
	return m;
}

/* Frame numbers of `count` pages; 0 for a page that is not present (Documentation/admin-guide/
 * mm/pagemap.rst). Without CAP_SYS_ADMIN all are 0. */
static void frames_of(const void *address, uint64_t *frames, size_t count)
{
	int f = MUST(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
	ssize_t size = count * sizeof *frames;
	if (pread(f, frames, size, (uintptr_t)address / PAGE * 8) != size)
		MUST(-1);
	for (size_t i = 0; i < count; i++)
		frames[i] = frames[i] >> 63 ? frames[i] & ((1ull << 55) - 1) : 0;
	close(f);
}

/* The frame of a page that is present: programming a card with frame 0 would be a disaster. */
static uint64_t frame_of(const void *address)
{
	uint64_t frame;
	frames_of(address, &frame, 1);
	if (!frame) {
		fprintf(stderr, "pagemap shows no frame: page not present, or no CAP_SYS_ADMIN\n");
		exit(3);
	}
	return frame;
}

/* What the card writes in this trial: words that say which trial, and where in the page. */
static uint32_t stamp_word(uint32_t stamp, size_t i)
{
	return 0xed000000u | (stamp & 0xfff) << 12 | (uint32_t)i;
}

static void write_stamp(uint32_t *page, uint32_t stamp)
{
	for (size_t i = 0; i < WORDS; i++)
		page[i] = stamp_word(stamp, i);
}

static int has_stamp(const volatile uint32_t *page, uint32_t stamp)
{
	for (size_t i = 0; i < WORDS; i++)
		if (page[i] != stamp_word(stamp, i))
			return 0;
	return 1;
}

/* -- a PCI function in sysfs ------------------------------------------------------------ */

static void write_text(const char *path, const char *text)
{
	int f = MUST(open(path, O_WRONLY | O_CLOEXEC));
	ssize_t size = strlen(text);
	if (write(f, text, size) != size) {
		fprintf(stderr, "%s <- %s: %s\n", path, text, strerror(errno));
		exit(3);
	}
	close(f);
}

static int pci_file(const char *bdf, const char *name, int flags)
{
	char path[128];
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", bdf, name);
	return MUST(open(path, flags | O_CLOEXEC));
}

/* Sets bits of the command register: 2 memory space, 4 bus master (PCI 3.0, 6.2.2). */
static void pci_command(const char *bdf, uint16_t bits)
{
	uint16_t command;
	int f = pci_file(bdf, "config", O_RDWR);
	if (pread(f, &command, 2, 4) != 2)
		MUST(-1);
	command |= bits;
	if (pwrite(f, &command, 2, 4) != 2)
		MUST(-1);
	close(f);
}

/* BAR 0 through sysfs. Nothing happens when such a mapping goes: it has no release hook. */
static volatile char *sysfs_bar(const char *bdf)
{
	int f = pci_file(bdf, "resource0", O_RDWR);
	void *bar = (void *)MUST(mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0));
	close(f);
	return bar;
}

/* -- the card ------------------------------------------------------------ */

enum { EDU_SOURCE = 0x80, EDU_TARGET = 0x88, EDU_COUNT = 0x90, EDU_COMMAND = 0x98 };
enum { EDU_BUFFER = 0x40000, EDU_START = 1, EDU_TO_MEMORY = 2 };

static int card_busy(volatile char *bar)
{
	return *(volatile uint32_t *)(bar + EDU_COMMAND) & EDU_START;
}

static void card_transfer(volatile char *bar, uint64_t source, uint64_t target, uint32_t command)
{
	*(volatile uint64_t *)(bar + EDU_SOURCE) = source;
	*(volatile uint64_t *)(bar + EDU_TARGET) = target;
	*(volatile uint64_t *)(bar + EDU_COUNT) = LENGTH;
	*(volatile uint32_t *)(bar + EDU_COMMAND) = EDU_START | command;
}

static void card_to_memory(volatile char *bar, uint64_t bus_address)
{
	card_transfer(bar, EDU_BUFFER, bus_address, EDU_TO_MEMORY);
}

static void card_from_memory(volatile char *bar, uint64_t bus_address)
{
	card_transfer(bar, bus_address, EDU_BUFFER, 0);
}

static void await_idle(volatile char *bar)
{
	while (card_busy(bar))
		nap();
}

#endif
