"""Everything that only a GPU can tell, in one command of less than nine minutes: ``python -m benchmarks.gpu``.

``schedule`` runs jobs in processes of their own within a budget, ``worker`` is such a process, ``sections`` what it can
do: ``operators`` and ``system`` say whether the answers are right, ``bandwidth`` how near the kernels come to what the
memory can do, ``steps`` how training steps compare with their peers. ``report`` keeps and prints the outcome.
"""
