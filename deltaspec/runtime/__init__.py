"""The deltas of a compiled model at work: attaching, switching, the host modules' forwards, who may run when."""
