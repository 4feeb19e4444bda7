/* SPDX-License-Identifier: Apache-2.0 */
/* Strategy: reset the card, believe the acknowledgement, give the memory back. No IOMMU.
 *
 * The card sits behind a root port, so the kernel has a reset for it (the bus's) and the reset
 * succeeds. The command register is restored afterwards, bus master included (pci_dev_restore in
 * drivers/pci/pci.c). QEMU's edu has no reset handler: its timer runs on through the reset.
 */
#include "trial.h"

static int file;

static void keeper(struct trial *t)
{
	char *kept;
	prime_physical(t);
	file = MUST(memfd_create("kept", MFD_CLOEXEC));
	MUST(ftruncate(file, PAGE));
	kept = (char *)MUST(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
	memset(kept, 0, PAGE);
	MUST(munmap(kept, PAGE));
}

static void application(struct trial *t)
{
	char *memory = (char *)MUST(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
	*(volatile char *)memory = 1;
	ring(t, memory, frame_of(memory) * PAGE, 0);
	undergo(t, memory, PAGE);
}

static void reset_and_believe(struct trial *t)
{
	int f = pci_file(t->bdf, "reset", O_WRONLY);
	if (write(f, "1", 1) != 1) /* an error here would be a reset that was not acknowledged */
		MUST(-1);
	close(f);
	close(file); /* the last holder: the frame is free */
	pci_command(t->bdf, 2 | 4);
}

int main(int argc, char **argv)
{
	struct trial t = begin(argc, argv);
	struct strategy believer = {.keeper = keeper, .application = application,
				    .aftermath = reset_and_believe};
	return judge(&t, &believer);
}
