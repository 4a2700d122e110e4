#pragma once

/// Everything a C++ user may see.
#include <selfattn/backend.h>
#include <selfattn/context_parallel.h>
#include <selfattn/kv_cache.h>
#include <selfattn/ops.h>
#include <selfattn/rope.h>
#include <selfattn/script.h>
#include <selfattn/sdpa.h>
#include <selfattn/self_attention.h>
