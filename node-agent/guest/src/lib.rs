//! PID 1 in the microVM: exec, files, image mounts; small and static.
