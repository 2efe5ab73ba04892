"""One study: what to try next, what to stop and what to repeat.

Also its database and its coordinators. No torch.
"""
