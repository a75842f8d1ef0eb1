"""Why a kernel is below 60 % of its limit, by measurement on one core of a Zen 5 (AVX-512), or of a Zen 3 (AVX2) where
the reason says so.

``perf record -e cpu-clock`` gave the shares of samples; the same kernel at other sizes, from cache or with fewer
channels, the rates; page faults and the time of a call without work are in the results.
"""

from __future__ import annotations

# Name -> the reason, as the table's legend prints it.
REASONS: dict[str, str] = {
    "epilogue": (
        "a vector of depthwise results takes about 9 cycles where its nine multiply-adds (3x3), two a cycle, take 4.5: "
        "the rest is mask bits, clamp or select, the store and the sum of the bias's gradient."
    ),
    "ring": (
        "half of the samples, with stride 2 three quarters, are in the copy of the input's rows into the ring; its "
        "loads wait for memory; the arithmetic does not overlap with it."
    ),
    "packing": (
        "the weights are laid out for the product anew in every call, before the images' threads start: `call_s`, "
        "the time on 2 x 2 pixels, is 0.15 of 0.84 ms for 160x6 (1.2 MB of weights), 0.06 of 0.60 ms for 32x6."
    ),
    "depthwise": (
        "the depthwise part (*epilogue*) takes more time than its share of the operations: of the samples and of the "
        "operations, 29 and 16 % in the 24x6 block, 35 and 24 % in the 5x5 one, 22 and 12 % in the 32x6 one; with "
        "its ring, 71 % of the samples where there is no expand convolution."
    ),
    "short sums": (
        "sums of 16 to 27 terms end before they pay for bias, clamp, mask and store: of 24 -> 144, multiply-adds "
        "are 33 % of the samples, vector stores and loads 27 %, broadcasts 18 %; and time at memory adds to that of"
        " arithmetic (41 % of the limit from memory, 52 % from cache)."
    ),
    "part vectors": (
        "24 channels fill one and a half vectors of 16, groups of 12 three quarters of one: up to a quarter of the "
        "multiply-adds is on padding (blocks leave out the half that nothing is in); 16 channels are one vector, "
        "which is one multiply-add a broadcast."
    ),
    "mask pass": (
        "applying the mask and adding up the bias gradient is a pass of its own into scratch: half of the samples "
        "of 24 -> 144, whose product then has 24 columns."
    ),
    "smooth pass": (
        "a smooth activation is a pass over pixels that are in cache. Of the pointwise 2.2 ms h-swish takes 0.2, then "
        "0.4 in backward, of the depthwise 1.8 it takes 0.4; SiLU, an exponential and a division an element, 0.8 to "
        "1.1 (Zen 3, beside the same convolution without activation)."
    ),
    "again": (
        "backward computes expansion and depthwise convolution again, which counts nothing here: it does 1.5 to 1.8"
        " times the operations that are counted. Of the samples of forward and backward together, products are 79 %, "
        "depthwise 8, activations 7 % of 112 -> 672 with h-swish, and 35, 10 and 41 % of 16 -> 96 with SiLU (Zen 3)."
    ),
    "picture": (
        "the gradient of 3 channels is oneDNN's. Why that is slow was not looked into: no network asks for the "
        "gradient of its picture."
    ),
    "pages": (
        "9400 page faults a call: glibc maps a result above 32 MB afresh every time, and clearing its pages takes "
        "longer than the kernel. With results that stay (MALLOC_MMAP_THRESHOLD_, MALLOC_TOP_PAD_), relu6's backward"
        " reaches 78 % of the copy, depthwise stride 2 backward 45 %. Fused blocks have no such tensor."
    ),
    "winner": (
        "bound by instructions: every element of a window is compared (NaN too), blended, and its position kept; "
        "backward unpacks the positions and turns them into lanes. From cache it is hardly faster (28 GB/s, where a"
        " copy does 93)."
    ),
    "window": (
        "bound by instructions: loop and index bookkeeping for one and a half to four vectors of channels a window "
        "is half of forward's samples (add, cmp, test, jle), and the copy comes from cache; 256 channels reach the "
        "limit."
    ),
    "gather": (
        "index arithmetic and branches are about half of the samples (24 channels): interpolation weights are found"
        " again for every vector of channels. In backward each row is read for two rows of the branch and added up "
        "in scratch."
    ),
    "two passes": (
        "x is read twice, for the statistics (39 % of the samples) and to be normalised; backward reads x and dy "
        "twice. The floor counts one pass."
    ),
    "exponential": "an exponential and a division an element (Sleef's, vector by vector), and in backward once more.",
    "codes": "a vector's codes are narrowed to bytes and stored lane by lane.",
    "branch": (
        "convolutions are 58 % of the samples (24 channels); statistics and normalisation of two norms, padding and"
        " packing are the rest, on tensors of a few hundred KB."
    ),
    "call": (
        "the call itself (Python, autograd, dispatcher) takes 20 to 35 us, measured on 2 x 2 pixels (`call_s` of "
        "the results), of 50 to 180."
    ),
    "stem": (
        "on a Zen 3, forward: the stem's sums of 27 terms, the depthwise rows and the projection are 52, 17 and 31 %"
        " of the operations and 39, 20 and 20 % of the samples, copying the image's rows 7 %; backward: projection"
        " and depthwise 64 and 36 % of the operations, 42 and 32 % of the samples, adding up dy for the bias 11 %."
    ),
    "squares": (
        "7 x 7 results are covered by 4 x 4 squares of 2 x 2, 64 pixels for 49, and 9.4 MB of weights are packed and "
        "transformed in every call: `call_s` is 4.4 ms forward and 6.1 backward, of 19 (Zen 3)."
    ),
    "narrow": (
        "12 results, or sums over 12 channels, fill one and a half vectors of 8. Forward is oneDNN's arithmetic and"
        " our pass; in backward half of the samples are the product's, 18 % masking and adding up dy; the call takes"
        " 150 and 240 us of 1.8 and 1.2 ms (Zen 3)."
    ),
    "minute": (
        "66 to 82 % in runs before this one: a core of this machine is half as fast again in one minute as in "
        "another, and the limit was measured in one of its own."
    ),
    "tenants": (
        "77 to 85 % in two other runs (average pooling), 61 and 67 % (hard sigmoid); what it waits for is the memory "
        "that the machine's other tenants share."
    ),
    "eight rows": (
        "moving the weight and multiplying it take about as long, and their times add up: with the weight in cache a"
        " forward call takes 0.13 ms, of which the products are 0.09 at the best rate, from memory 0.20 (Zen 4)."
    ),
    "ATen": "ATen's kernel: this package has none of its own.",
}

_FORWARD, _BACKWARD = ("forward",), ("backward",)
_BOTH = ("forward", "backward")

_ENTRIES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("pointwise_1x1_24_144_56", _FORWARD, ("short sums",)),
    ("pointwise_1x1_24_144_56", _BACKWARD, ("mask pass", "part vectors")),
    ("pointwise_1x1_144_24_56", _FORWARD, ("part vectors",)),
    ("pointwise_1x1_144_24_56", _BACKWARD, ("short sums",)),
    ("pointwise_1x1_96_576_14", _BOTH, ("packing",)),
    ("pointwise_1x1_320_1280_7", _BOTH, ("packing",)),
    ("pointwise_int8_1x1_320_1280_7", _BOTH, ("packing",)),
    ("depthwise_3x3_s1_144_56", _BOTH, ("ring", "epilogue")),
    ("depthwise_int8_3x3_s1_144_56", _BOTH, ("ring", "epilogue")),
    ("depthwise_3x3_s2_96_112", _FORWARD, ("ring", "epilogue")),
    ("depthwise_3x3_s2_96_112", _BACKWARD, ("pages", "epilogue")),
    ("depthwise_5x5_s1_240_28", _BOTH, ("epilogue",)),
    ("depthwise_5x5_s2_144_56", _FORWARD, ("ring", "epilogue")),
    ("depthwise_5x5_s2_144_56", _BACKWARD, ("epilogue",)),
    ("depthwise_7x7_s1_192_28", _BOTH, ("epilogue",)),
    ("depthwise_7x7_s2_144_56", _BOTH, ("epilogue",)),
    ("pointwise_hardswish_1x1_112_672_14", _BOTH, ("packing", "smooth pass")),
    ("pointwise_silu_1x1_112_672_14", _BOTH, ("smooth pass", "packing")),
    ("depthwise_hardswish_5x5_s1_672_14", _BOTH, ("epilogue", "smooth pass")),
    ("depthwise_silu_5x5_s1_672_14", _BOTH, ("smooth pass", "epilogue")),
    ("stem_3x3_s2_3_32_224", _FORWARD, ("short sums",)),
    ("stem_3x3_s2_3_32_224", _BACKWARD, ("picture",)),
    ("dense_3x3_s2_128_128_56", _BOTH, ("minute",)),
    ("grouped_5x5_g2_96_96_14", _BOTH, ("minute",)),
    ("dense_3x3_512_512_7", _BOTH, ("squares",)),
    ("dense_3x3_48_12_28", _BOTH, ("narrow",)),
    ("stem_block_3_32_16_224", _BOTH, ("stem",)),
    ("inverted_residual_32x1_16_s1_112", _BOTH, ("depthwise", "part vectors")),
    ("mbconv_relu_5x5_se_40_120_40_s1_28", _FORWARD, ("depthwise",)),
    ("mbconv_relu_5x5_se_40_120_40_s1_28", _BACKWARD, ("again", "depthwise")),
    ("mbconv_hardswish_80_200_80_s1_14", _FORWARD, ("packing", "smooth pass")),
    ("mbconv_hardswish_80_200_80_s1_14", _BACKWARD, ("again", "packing")),
    ("mbconv_hardswish_5x5_se_160_960_160_s1_7", _FORWARD, ("packing", "depthwise")),
    ("mbconv_hardswish_5x5_se_160_960_160_s1_7", _BACKWARD, ("again", "packing")),
    ("mbconv_silu_se_16_96_24_s2_112", _FORWARD, ("smooth pass", "short sums")),
    ("mbconv_silu_se_16_96_24_s2_112", _BACKWARD, ("again", "smooth pass")),
    ("mbconv_silu_5x5_se_112_672_112_s1_14", _FORWARD, ("smooth pass", "depthwise")),
    ("mbconv_silu_5x5_se_112_672_112_s1_14", _BACKWARD, ("again", "smooth pass")),
    ("inverted_residual_16x6_24_s2_112", _BOTH, ("short sums", "depthwise")),
    ("inverted_residual_24x6_24_s1_56", _BOTH, ("depthwise", "short sums", "part vectors")),
    ("inverted_residual_32x6_32_s1_28", _BOTH, ("depthwise", "packing")),
    ("inverted_residual_64x6_64_s1_14", _BOTH, ("packing", "depthwise")),
    ("inverted_residual_96x6_160_s2_14", _BOTH, ("packing",)),
    ("inverted_residual_160x6_160_s1_7", _BOTH, ("packing",)),
    ("inverted_residual_5x5_40x6_40_s1_28", _BOTH, ("depthwise",)),
    ("inverted_residual_pooled_32x6_32_s1_28", _BOTH, ("depthwise", "packing")),
    ("relu6_96_112", _BOTH, ("pages",)),
    ("relu_64_56", _BACKWARD, ("call",)),
    ("leaky_relu_64_56", _BACKWARD, ("call",)),
    ("hardsigmoid_64_56", _BACKWARD, ("call",)),
    ("silu_code_bits_8_96_56", _BOTH, ("exponential", "codes")),
    ("max_pool_3x3_s2_64_112", _BOTH, ("winner",)),
    ("max_pool_2x2_s2_64_56", _BOTH, ("winner",)),
    ("avg_pool_2x2_s2_24_56", _BOTH, ("window", "call")),
    ("avg_pool_2x2_s2_256_56", _FORWARD, ("tenants",)),
    ("avg_pool_3x3_s1_64_28", _BOTH, ("window", "call")),
    ("global_avg_pool_1280_7", _BOTH, ("ATen", "call")),
    ("upsample_add_24_56", _BOTH, ("gather", "call")),
    ("upsample_add_256_56", _BOTH, ("gather",)),
    ("group_norm_relu6_144_56", _BOTH, ("two passes",)),
    ("group_norm_silu_96_28", _BOTH, ("exponential", "two passes")),
    ("group_norm_64_56", _BOTH, ("two passes",)),
    ("hardsigmoid_64_56", _FORWARD, ("tenants",)),
    ("lite_branch_24_24_28", _BOTH, ("part vectors", "branch")),
    ("lite_branch_96_96_7", _BOTH, ("packing", "branch")),
    ("linear_1280_1000", _BOTH, ("eight rows",)),
)

# (case, direction) -> names of reasons, the weightiest first.
NOTES: dict[tuple[str, str], tuple[str, ...]] = {
    (case, direction): reasons for case, directions, reasons in _ENTRIES for direction in directions
}
