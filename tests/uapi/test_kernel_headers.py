# SPDX-License-Identifier: Apache-2.0
"""Numbers and layouts of VFIO and iommufd, compared with the C compiler's view of the headers.

What the installed headers do not have yet (IOMMU_IOAS_MAP_FILE is from Linux 6.13) is left out.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from holdfast.uapi import ioc, iommufd, vfio

INCLUDE = Path("/usr/include/linux")

VFIO_NUMBERS = {
    "VFIO_API_VERSION": vfio.API_VERSION,
    "VFIO_TYPE1_IOMMU": vfio.TYPE1_IOMMU,
    "VFIO_TYPE1v2_IOMMU": vfio.TYPE1V2_IOMMU,
    "VFIO_NOIOMMU_IOMMU": vfio.NOIOMMU_IOMMU,
    "VFIO_UNMAP_ALL": vfio.UNMAP_ALL,
    "VFIO_DMA_UNMAP_FLAG_ALL": vfio.DMA_UNMAP_ALL,
    "VFIO_GET_API_VERSION": vfio.GET_API_VERSION,
    "VFIO_CHECK_EXTENSION": vfio.CHECK_EXTENSION,
    "VFIO_SET_IOMMU": vfio.SET_IOMMU,
    "VFIO_GROUP_GET_STATUS": vfio.GROUP_GET_STATUS,
    "VFIO_GROUP_SET_CONTAINER": vfio.GROUP_SET_CONTAINER,
    "VFIO_GROUP_GET_DEVICE_FD": vfio.GROUP_GET_DEVICE_FD,
    "VFIO_GROUP_FLAGS_VIABLE": vfio.GROUP_FLAGS_VIABLE,
    "VFIO_GROUP_FLAGS_CONTAINER_SET": vfio.GROUP_FLAGS_CONTAINER_SET,
    "VFIO_DEVICE_GET_INFO": vfio.DEVICE_GET_INFO,
    "VFIO_DEVICE_GET_REGION_INFO": vfio.DEVICE_GET_REGION_INFO,
    "VFIO_DEVICE_GET_IRQ_INFO": vfio.DEVICE_GET_IRQ_INFO,
    "VFIO_DEVICE_SET_IRQS": vfio.DEVICE_SET_IRQS,
    "VFIO_DEVICE_RESET": vfio.DEVICE_RESET,
    "VFIO_DEVICE_BIND_IOMMUFD": vfio.DEVICE_BIND_IOMMUFD,
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT": vfio.DEVICE_ATTACH_IOMMUFD_PT,
    "VFIO_DEVICE_FLAGS_RESET": vfio.DEVICE_FLAGS_RESET,
    "VFIO_DEVICE_FLAGS_PCI": vfio.DEVICE_FLAGS_PCI,
    "VFIO_REGION_INFO_FLAG_READ": vfio.REGION_INFO_FLAG_READ,
    "VFIO_REGION_INFO_FLAG_WRITE": vfio.REGION_INFO_FLAG_WRITE,
    "VFIO_REGION_INFO_FLAG_MMAP": vfio.REGION_INFO_FLAG_MMAP,
    "VFIO_REGION_INFO_FLAG_CAPS": vfio.REGION_INFO_FLAG_CAPS,
    "VFIO_REGION_INFO_CAP_SPARSE_MMAP": vfio.REGION_INFO_CAP_SPARSE_MMAP,
    "VFIO_REGION_INFO_CAP_MSIX_MAPPABLE": vfio.REGION_INFO_CAP_MSIX_MAPPABLE,
    "VFIO_PCI_CONFIG_REGION_INDEX": vfio.PCI_CONFIG_REGION_INDEX,
    "VFIO_PCI_NUM_REGIONS": vfio.PCI_NUM_REGIONS,
    "VFIO_PCI_NUM_IRQS": vfio.PCI_NUM_IRQS,
    "VFIO_IRQ_INFO_EVENTFD": vfio.IRQ_INFO_EVENTFD,
    "VFIO_IRQ_INFO_MASKABLE": vfio.IRQ_INFO_MASKABLE,
    "VFIO_IRQ_INFO_AUTOMASKED": vfio.IRQ_INFO_AUTOMASKED,
    "VFIO_IRQ_INFO_NORESIZE": vfio.IRQ_INFO_NORESIZE,
    "VFIO_IRQ_SET_DATA_NONE": vfio.IRQ_SET_DATA_NONE,
    "VFIO_IRQ_SET_DATA_BOOL": vfio.IRQ_SET_DATA_BOOL,
    "VFIO_IRQ_SET_DATA_EVENTFD": vfio.IRQ_SET_DATA_EVENTFD,
    "VFIO_IRQ_SET_ACTION_MASK": vfio.IRQ_SET_ACTION_MASK,
    "VFIO_IRQ_SET_ACTION_UNMASK": vfio.IRQ_SET_ACTION_UNMASK,
    "VFIO_IRQ_SET_ACTION_TRIGGER": vfio.IRQ_SET_ACTION_TRIGGER,
    "VFIO_IOMMU_GET_INFO": vfio.IOMMU_GET_INFO,
    "VFIO_IOMMU_MAP_DMA": vfio.IOMMU_MAP_DMA,
    "VFIO_IOMMU_UNMAP_DMA": vfio.IOMMU_UNMAP_DMA,
    "VFIO_IOMMU_INFO_PGSIZES": vfio.IOMMU_INFO_PGSIZES,
    "VFIO_IOMMU_INFO_CAPS": vfio.IOMMU_INFO_CAPS,
    "VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE": vfio.IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    "VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL": vfio.IOMMU_TYPE1_INFO_DMA_AVAIL,
    "VFIO_DMA_MAP_FLAG_READ": vfio.DMA_MAP_FLAG_READ,
    "VFIO_DMA_MAP_FLAG_WRITE": vfio.DMA_MAP_FLAG_WRITE,
}
VFIO_LAYOUTS = {
    ("vfio_group_status", "argsz flags"): vfio.GROUP_STATUS,
    ("vfio_info_cap_header", "id version next"): vfio.INFO_CAP_HEADER,
    ("vfio_device_info", "argsz flags num_regions num_irqs"): vfio.DEVICE_INFO,
    ("vfio_region_info", "argsz flags index cap_offset size offset"): vfio.REGION_INFO,
    ("vfio_region_sparse_mmap_area", "offset size"): vfio.SPARSE_MMAP_AREA,
    ("vfio_irq_info", "argsz flags index count"): vfio.IRQ_INFO,
    ("vfio_irq_set", "argsz flags index start count"): vfio.IRQ_SET,
    ("vfio_device_bind_iommufd", "argsz flags iommufd out_devid"): vfio.BIND_IOMMUFD,
    ("vfio_device_attach_iommufd_pt", "argsz flags pt_id"): vfio.ATTACH_IOMMUFD_PT,
    ("vfio_iommu_type1_info", "argsz flags iova_pgsizes cap_offset pad"): vfio.TYPE1_INFO,
    ("vfio_iova_range", "start end"): vfio.IOVA_RANGE,
    ("vfio_iommu_type1_dma_map", "argsz flags vaddr iova size"): vfio.DMA_MAP,
    ("vfio_iommu_type1_dma_unmap", "argsz flags iova size"): vfio.DMA_UNMAP,
}
IOMMUFD_NUMBERS = {
    "IOMMU_DESTROY": iommufd.DESTROY,
    "IOMMU_IOAS_ALLOC": iommufd.IOAS_ALLOC,
    "IOMMU_IOAS_IOVA_RANGES": iommufd.IOAS_IOVA_RANGES,
    "IOMMU_IOAS_MAP": iommufd.IOAS_MAP,
    "IOMMU_IOAS_UNMAP": iommufd.IOAS_UNMAP,
    "IOMMU_IOAS_MAP_FILE": iommufd.IOAS_MAP_FILE,
    "IOMMU_IOAS_MAP_FIXED_IOVA": iommufd.MAP_FIXED_IOVA,
    "IOMMU_IOAS_MAP_WRITEABLE": iommufd.MAP_WRITEABLE,
    "IOMMU_IOAS_MAP_READABLE": iommufd.MAP_READABLE,
}
IOMMUFD_LAYOUTS = {
    ("iommu_ioas_alloc", "size flags out_ioas_id"): iommufd.IOAS_ALLOC_ARG,
    (
        "iommu_ioas_iova_ranges",
        "size ioas_id num_iovas __reserved allowed_iovas out_iova_alignment",
    ): iommufd.IOVA_RANGES_ARG,
    ("iommu_iova_range", "start last"): iommufd.IOVA_RANGE,
    ("iommu_ioas_map", "size flags ioas_id __reserved user_va length iova"): iommufd.MAP_ARG,
    ("iommu_ioas_map_file", "size flags ioas_id fd start length iova"): iommufd.MAP_FILE_ARG,
    ("iommu_ioas_unmap", "size ioas_id iova length"): iommufd.UNMAP_ARG,
}


def offsets(layout: struct.Struct) -> list[int]:
    """Where each field of a packed layout begins, and where the last ends."""
    codes = layout.format.lstrip("<")
    return [struct.calcsize("<" + codes[:count]) for count in range(len(codes) + 1)]


def compiled(tmp_path: Path, header: str, names: list[str], fields: dict[str, str]) -> list[str]:
    """What a C program prints about names and structures of a header, a line for each."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not (INCLUDE / header).exists():
        pytest.skip(f"needs a C compiler and linux/{header}")
    known = (INCLUDE / header).read_text(encoding="utf-8")
    lines = ["#include <stddef.h>", "#include <stdio.h>", f"#include <linux/{header}>"]
    lines.append("int main(void) {")
    lines += [f'printf("{n} %lld\\n", (long long)({n}));' for n in names if n in known]
    for name, text in fields.items():
        if f"struct {name} {{" not in known:
            continue
        parts = text.split()
        lines.append(f'printf("{name}");')
        lines += [f'printf(" %zu", offsetof(struct {name}, {part}));' for part in parts]
        last = f"((struct {name} *)0)->{parts[-1]}"
        lines.append(f'printf(" %zu\\n", offsetof(struct {name}, {parts[-1]}) + sizeof({last}));')
    lines.append("return 0; }")
    source, program = tmp_path / "show.c", tmp_path / "show"
    source.write_text("\n".join(lines), encoding="utf-8")
    subprocess.run([compiler, str(source), "-o", str(program)], check=True, timeout=60)
    shown = subprocess.run([str(program)], check=True, capture_output=True, text=True, timeout=60)
    return shown.stdout.splitlines()


@pytest.mark.parametrize(
    ("header", "numbers", "layouts"),
    [
        ("vfio.h", VFIO_NUMBERS, VFIO_LAYOUTS),
        ("iommufd.h", IOMMUFD_NUMBERS, IOMMUFD_LAYOUTS),
    ],
)
def test_numbers_and_layouts_are_those_of_the_header(
    tmp_path: Path,
    header: str,
    numbers: dict[str, int],
    layouts: dict[tuple[str, str], struct.Struct],
) -> None:
    ours = {name: [value] for name, value in numbers.items()}
    ours |= {name: offsets(layout) for (name, _), layout in layouts.items()}
    theirs = {}
    for line in compiled(tmp_path, header, list(numbers), dict(layouts)):
        name, *values = line.split()
        theirs[name] = [int(value) for value in values]
    assert theirs
    assert {name: ours[name] for name in theirs} == theirs


def test_a_number_is_made_of_direction_size_type_and_number() -> None:
    assert ioc.io(";", 100) == 0x3B64
    assert ioc.ioc(ioc.READ | ioc.WRITE, "X", 119, 4) == 0xC004_5877  # FIFREEZE, linux/fs.h
