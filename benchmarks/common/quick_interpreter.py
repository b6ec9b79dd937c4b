"""Spares Triton's interpreter what it does again and again. What it computes stays the same."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@cache
def quicken_interpreter() -> None:
    """For the rest of this process. A launch replaces the language's functions, and so did every call of a device
    function in it, a quarter of all time: now a launch does it once. Element types are looked up once. Sums are no more
    computed a second time, for a check of overflow that asserts nothing outside debug mode."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    replace_language = interpreter._patch_lang
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # what kernels and Triton's own functions use

    numpy_type_of_pointer, numpy_type_of_number = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)

    def numpy_type(triton_type: Any) -> Any:
        element = triton_type.element_ty if isinstance(triton_type, tl.block_type) else triton_type
        is_pointer = isinstance(element, tl.pointer_type)  # which has no hash
        return numpy_type_of_pointer(element) if is_pointer else numpy_type_of_number(element)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return self.rewrite()(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = lambda _: replace_language(language)
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = numpy_type
