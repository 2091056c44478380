/* Compiling the functions of one file for an instruction set that the rest of the extension does not assume.

   System headers are included first, at the baseline. */
#ifndef DSM_TARGET_H
#define DSM_TARGET_H

#include "engine.h"

#include <math.h>

#define DSM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DSM_TARGET_BEGIN(isa) DSM_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define DSM_TARGET_END _Pragma("clang attribute pop")
#else
#define DSM_TARGET_BEGIN(isa) _Pragma("GCC push_options") DSM_PRAGMA(GCC target(isa))
#define DSM_TARGET_END _Pragma("GCC pop_options")
#endif

#endif
