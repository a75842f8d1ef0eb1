"""The Triton kernels held to account without a GPU: compiled ahead of time, and their bytes counted.

    python -m benchmarks.aot [--network mobilenet_v2] [--dtype bfloat16] [--arch sm_90] [--kernel dense] [--jobs 2]

Runs the operators of MobileNetV2 and ResNet-50 (batch 128, 224x224, channels_last) on tensors without memory, and so
collects the very launches that a GPU would get; dense convolutions both ways, by cuDNN between two kernels and by ours.
Each distinct kernel is compiled for every architecture (float32 for one of each maker unless ``--everything``); the
table gives registers, spilled bytes, shared memory, tensor-core instructions and the widest load, read from the machine
code.

Bytes come from the launch geometry, over the floor (every tensor read or written once):
``l2`` is what all programs ask for, each counting what it needs once; ``memory`` is what reaches DRAM, where a tile
asked for again comes from L2 if what passes through in between fits in half of it. Partial sums count in both.

Exits with 1 where a kernel spills or does not fit shared memory, where half precision has a dot product without tensor
cores, or where a pointwise or depthwise kernel moves more than 1.15 times the floor.
"""
