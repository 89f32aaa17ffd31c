// The one name of Apple's header that metal-cpp uses; zig carries no IOSurface.
#pragma once

typedef struct __IOSurface* IOSurfaceRef;
