"""Allocates ranges of a one-dimensional arena. Knows offsets and sizes in elements; knows no memory."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class ArenaAllocator:
    """Best fit over [0, capacity), the lowest offset among equals; freed neighbours merge. Deterministic.

    capacity and alignment count elements. Every range starts on, and is rounded up to, a multiple of the alignment.
    """

    def __init__(self, capacity: int, alignment: int = 1) -> None:
        if alignment < 1:
            raise ValueError(f"alignment must be at least 1 element, got {alignment}")
        if capacity < alignment:
            raise ValueError(f"capacity must be at least one alignment unit ({alignment} elements), got {capacity}")
        self.alignment = alignment
        self.capacity = capacity - capacity % alignment
        self._hole_starts = [0]  # sorted; _hole_sizes[i] belongs to _hole_starts[i]
        self._hole_sizes = [self.capacity]
        self._sizes: dict[int, int] = {}  # offset of a range -> its rounded size

    @property
    def num_free(self) -> int:
        return sum(self._hole_sizes)

    @property
    def largest_hole(self) -> int:
        return max(self._hole_sizes, default=0)

    def rounded(self, num_elements: int) -> int:
        """The size a range really takes."""
        return -(-num_elements // self.alignment) * self.alignment

    def fits(self, num_elements: int) -> bool:
        return self.rounded(num_elements) <= self.largest_hole

    def allocate(self, num_elements: int) -> int | None:
        """Offset of a new range, or None if no hole is large enough."""
        assert num_elements > 0, f"a range has at least 1 element, got {num_elements}"
        size = self.rounded(num_elements)
        fitting = [(hole, index) for index, hole in enumerate(self._hole_sizes) if hole >= size]
        if not fitting:
            return None
        offset = self._hole_starts[min(fitting)[1]]
        self._claim(offset, size)
        return offset

    def free(self, offset: int) -> None:
        """Free the range at `offset`."""
        assert offset in self._sizes, f"nothing is allocated at {offset}"
        size = self._sizes.pop(offset)
        index = bisect_left(self._hole_starts, offset)
        if index < len(self._hole_starts) and offset + size == self._hole_starts[index]:
            size += self._hole_sizes[index]
            del self._hole_starts[index], self._hole_sizes[index]
        if index > 0 and self._hole_starts[index - 1] + self._hole_sizes[index - 1] == offset:
            self._hole_sizes[index - 1] += size
        else:
            self._hole_starts.insert(index, offset)
            self._hole_sizes.insert(index, size)

    def _claim(self, offset: int, size: int) -> None:
        """Allocate [offset, offset + size), which lies in one hole."""
        index = bisect_right(self._hole_starts, offset) - 1
        assert index >= 0, f"nothing is free at {offset}"
        start, end = self._hole_starts[index], self._hole_starts[index] + self._hole_sizes[index]
        assert offset + size <= end, f"{size} at {offset} are not free"
        rests = [(start, offset - start), (offset + size, end - offset - size)]
        kept = [rest for rest in rests if rest[1]]
        self._hole_starts[index : index + 1] = [rest[0] for rest in kept]
        self._hole_sizes[index : index + 1] = [rest[1] for rest in kept]
        self._sizes[offset] = size

    def copy(self) -> ArenaAllocator:
        """An independent allocator in the same state, to try things on."""
        twin = ArenaAllocator(self.capacity, self.alignment)
        twin._hole_starts = list(self._hole_starts)
        twin._hole_sizes = list(self._hole_sizes)
        twin._sizes = dict(self._sizes)
        return twin
