// The few names of Apple's header that metal-cpp uses; zig carries no
// CoreFoundation.
#pragma once

typedef const void* CFTypeRef;
typedef const struct __CFString* CFStringRef;
typedef double CFTimeInterval;
typedef double CFAbsoluteTime;
