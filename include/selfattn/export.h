#pragma once

/// Marks what a user of libselfattn may link against; everything else in the library is hidden.
#define SELFATTN_API __attribute__((visibility("default")))
