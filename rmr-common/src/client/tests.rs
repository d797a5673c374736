//! Unit tests of the machine; the simulator tests it together with replicas.
