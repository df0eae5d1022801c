"""Methods on task vectors: what each model learnt beyond a common base.

d_i = X_i - X_0 is the task vector of model i and the result is X_0 + scale * d, where `scale` is
the papers' lambda. Most of these methods are three choices: what is kept of each d_i (`gains`: one
mask or factor per element), whether the models vote on the sign of each element, and what the sum
is divided by. `merge` is that sum, in one pass and without making the task vectors.
"""

from plymix.methods.task import breadcrumbs, centre, changes, dare, della, ties

__all__ = ["breadcrumbs", "centre", "changes", "dare", "della", "ties"]
