/* SPDX-License-Identifier: Apache-2.0 */
/* Strategy: memory that belongs to a file which a keeper holds; the application only maps it.
 *
 * The frames belong to the page cache of the file, so the application's death, exec, munmap
 * or MADV_DONTNEED take away a mapping and nothing else. But a file is not a pin: whoever can write
 * to it can punch a hole, and then the frame goes back at once, keeper or not.
 *
 *   memfd, hugetlb   the file alone
 *   uring            the keeper also registers the memory as an io_uring buffer: a long-term pin
 *   udmabuf          the keeper also makes a dma-buf of it (drivers/dma-buf/udmabuf.c pins folios)
 */
#include "trial.h"
#include <linux/udmabuf.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

static int file;
static char *kept; /* the keeper's own mapping */
static size_t size;

static void pin_by_io_uring(void)
{
	char parameters[120] = {0}; /* struct io_uring_params: its header does not go with fcntl.h */
	struct iovec buffer = {kept, size};
	int ring_fd = syscall(SYS_io_uring_setup, 1, parameters);
	if (ring_fd == -1)
		lacking("io_uring");
	MUST(syscall(SYS_io_uring_register, ring_fd, 0 /* IORING_REGISTER_BUFFERS */, &buffer, 1));
}

static void pin_by_udmabuf(void)
{
	struct udmabuf_create create = {file, UDMABUF_FLAGS_CLOEXEC, 0, size};
	int device = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
	if (device == -1)
		lacking("udmabuf");
	MUST(ioctl(device, UDMABUF_CREATE, &create));
}

static void keeper(struct trial *t)
{
	int huge = is(t->variant, "hugetlb");
	prime_physical(t);
	size = huge ? HUGE : region(t);
	file = MUST(memfd_create("kept", MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB : 0)));
	MUST(ftruncate(file, size));
	MUST(fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
	kept = (char *)MUST(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
	memset(kept, 0, size);
	if (is(t->variant, "uring"))
		pin_by_io_uring();
	if (is(t->variant, "udmabuf"))
		pin_by_udmabuf();
}

static void application(struct trial *t)
{
	char *aligned = private_memory(size);
	char *memory = (char *)MUST(mmap(aligned, size, PROT_READ | PROT_WRITE,
					 MAP_SHARED | MAP_FIXED, file, 0));
	char *page = target(t, memory);
	*(volatile char *)page = 1;
	ring(t, page, frame_of(page) * PAGE, 0);
	undergo(t, memory, size);
}

static int arrived(struct trial *t)
{
	return has_stamp((uint32_t *)target(t, kept), t->stamp);
}

/* The innocent takes from where the frame would go: the pool of huge pages. */
static char *take_huge(size_t pages)
{
	return (char *)MUST(mmap(NULL, (pages * PAGE + HUGE - 1) & ~(HUGE - 1), PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0));
}

int main(int argc, char **argv)
{
	struct trial t = begin(argc, argv);
	struct strategy file_kept = {.keeper = keeper, .application = application,
				     .arrived = arrived};
	if (is(t.variant, "hugetlb"))
		file_kept.take = take_huge;
	return judge(&t, &file_kept);
}
