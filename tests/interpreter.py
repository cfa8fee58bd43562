"""Triton's interpreter without what it does over and over to no effect; the numbers are the same."""

import dataclasses

from triton.runtime import interpreter


def quicken() -> None:
    """A launch replaces the language's functions, and every call of a device function in it does so again: once for
    each module is enough. Sums of integers are checked for overflows, of which nothing is said without a debug option.
    """
    replace, builder = interpreter._patch_lang, interpreter.interpreter_builder
    done = {}
    """By module, the first that of the launch."""

    def once(fn):
        if fn.__module__ in done:
            return done[fn.__module__]
        scope = done[fn.__module__] = replace(fn)
        if len(done) == 1:
            restore = scope.restore

            def end():
                done.clear()
                restore()

            scope.restore = end
        return scope

    interpreter._patch_lang = once
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
