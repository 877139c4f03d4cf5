//! The node agent: runs sandboxes as microVMs and splices clients' streams to guests.
