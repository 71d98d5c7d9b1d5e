// errors.cu - the message that a failed run leaves.
#include "rx/launch.cuh"

extern "C" const char* rx_cuda_last_error(void) { return rx::last_error().c_str(); }
