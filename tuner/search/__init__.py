"""One study: what to try next, what to stop, what to repeat; its database and its coordinators. No torch."""
