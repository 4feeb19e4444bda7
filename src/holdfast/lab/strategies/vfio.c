/* SPDX-License-Identifier: Apache-2.0 */
/* Strategies behind an IOMMU: VFIO type1 (linux/vfio.h, drivers/vfio/vfio_iommu_type1.c).
 *
 * A mapping takes a long-term reference on each page. It belongs to the container's open file, not
 * to the process, and goes by an explicit unmap, or when the last descriptor and BAR mapping is
 * gone: then the kernel turns bus master off, and unmaps, and lets the pages go, in this order.
 *
 *   alone     the application opens everything itself; its death is the last close
 *   keeper    a keeper holds container, group and device, and waits until the card is idle
 *   timeout   a keeper that stops waiting: it unmaps, and gives the same IOVA to the next tenant
 *   reset     a keeper that resets the card, believes it, and gives the same IOVA to the next tenant
 */
#include "trial.h"
#include <linux/vfio.h>
#include <sys/ioctl.h>

#define IOVA 0x100000ul  /* of the application's memory; then, with a bad keeper, of the tenant's */
#define SCRATCH 0x800000ul /* of the keeper's own page */

static int container, group, device;

static void map(void *memory, size_t size, uint64_t iova)
{
	struct vfio_iommu_type1_dma_map m = {sizeof m, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
					     (uintptr_t)memory, iova, size};
	MUST(ioctl(container, VFIO_IOMMU_MAP_DMA, &m));
}

static void unmap(size_t size, uint64_t iova)
{
	struct vfio_iommu_type1_dma_unmap u = {.argsz = sizeof u, .iova = iova, .size = size};
	MUST(ioctl(container, VFIO_IOMMU_UNMAP_DMA, &u));
	if (u.size != size) { /* success with size 0: nothing was unmapped */
		fprintf(stderr, "unmapped %llu of %zu bytes\n", (unsigned long long)u.size, size);
		exit(3);
	}
}

static void bus_master_on(void)
{
	struct vfio_region_info config = {.argsz = sizeof config, .index = VFIO_PCI_CONFIG_REGION_INDEX};
	uint16_t command;
	MUST(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &config));
	MUST(pread(device, &command, 2, config.offset + 4));
	command |= 2 | 4;
	if (pwrite(device, &command, 2, config.offset + 4) != 2)
		MUST(-1);
}

static void open_function(struct trial *t)
{
	struct vfio_region_info bar = {.argsz = sizeof bar, .index = VFIO_PCI_BAR0_REGION_INDEX};
	char path[128], link[128] = "";
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", t->bdf);
	MUST(readlink(path, link, sizeof link - 1));
	snprintf(path, sizeof path, "/dev/vfio/%s", strrchr(link, '/') + 1);
	container = MUST(open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC));
	group = MUST(open(path, O_RDWR | O_CLOEXEC));
	MUST(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container));
	MUST(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU));
	device = MUST(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, t->bdf));
	MUST(fcntl(device, F_SETFD, FD_CLOEXEC));
	MUST(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &bar));
	t->bar = (volatile char *)MUST(mmap(NULL, bar.size, PROT_READ | PROT_WRITE, MAP_SHARED,
					    device, bar.offset));
	bus_master_on();
	await_idle(t->bar);
}

static uint32_t *scratch;

static void open_and_prime(struct trial *t)
{
	open_function(t);
	scratch = (uint32_t *)private_memory(PAGE);
	map(scratch, PAGE, SCRATCH);
	prime(t, scratch, SCRATCH);
}

static void keeper(struct trial *t)
{
	if (!is(t->variant, "alone"))
		open_and_prime(t);
}

static void application(struct trial *t)
{
	char *memory = private_memory(region(t));
	if (is(t->variant, "alone"))
		open_and_prime(t);
	memset(memory, 0, region(t));
	map(memory, region(t), IOVA);
	ring(t, target(t, memory), IOVA + region(t) - PAGE, 0);
	undergo(t, memory, region(t));
}

static void aftermath(struct trial *t)
{
	if (is(t->variant, "timeout"))
		unmap(PAGE, IOVA); /* the time is up, whatever the card does */
	if (is(t->variant, "reset")) {
		MUST(ioctl(device, VFIO_DEVICE_RESET));
		unmap(PAGE, IOVA);
		bus_master_on();
	}
}

/* The next tenant's memory, at the IOVA that was the dead application's. */
static void tenancy(struct trial *t, char *memory)
{
	(void)t;
	map(memory, PAGE, IOVA);
}

/* Did the transfer end in the dead application's page? The card itself carries the contents
 * over: its buffer is emptied, then filled from the page, then written to the keeper's page. */
static int arrived(struct trial *t)
{
	if (!is(t->variant, "keeper"))
		return 0;
	memset(scratch, 0, PAGE);
	card_from_memory(t->bar, SCRATCH), await_idle(t->bar);
	card_from_memory(t->bar, IOVA + region(t) - PAGE), await_idle(t->bar);
	card_to_memory(t->bar, SCRATCH), await_idle(t->bar);
	unmap(region(t), IOVA);
	return has_stamp(scratch, t->stamp);
}

int main(int argc, char **argv)
{
	struct trial t = begin(argc, argv);
	struct strategy vfio = {.keeper = keeper, .application = application,
				.aftermath = aftermath, .arrived = arrived};
	if (is(t.variant, "timeout") || is(t.variant, "reset"))
		vfio.tenancy = tenancy;
	return judge(&t, &vfio);
}
