// NumPy's C API, as of the oldest NumPy that pycomm takes. A source that uses it imports it (import_array1).
#pragma once

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define NPY_TARGET_VERSION NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>
