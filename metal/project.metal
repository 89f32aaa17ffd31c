#include "formats/families.h"
#include "project.h"
