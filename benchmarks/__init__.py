"""What tinytl_kernels is worth in seconds and bytes, beside everything a user would pick instead.

    pytest benchmarks/ --benchmark-only --benchmark-json=results.json
    python -m benchmarks.tables results.json

``cases`` says what is run, ``contestants`` (``peers``, ``ours``) who runs it, ``answers`` whether the answer is right,
``interleave`` how long it took, ``memory`` what it held; ``match`` puts them together and ``tables`` prints them.

The kernels of the CPU backend are held against the machine rather than against peers: ``kernels`` says which,
``roofline`` how near they come, ``notes`` why not nearer, ``kernel_table`` prints it.
"""
