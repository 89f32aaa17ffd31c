# CMake for macOS 14 on Apple silicon, on Linux. build.py sets the environment that bin/ reads.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_CXX_COMPILER "${CMAKE_CURRENT_LIST_DIR}/bin/c++")
set(CMAKE_AR "${CMAKE_CURRENT_LIST_DIR}/bin/ar" CACHE FILEPATH "")
set(CMAKE_RANLIB "${CMAKE_CURRENT_LIST_DIR}/bin/ranlib" CACHE FILEPATH "")
set(CMAKE_INSTALL_NAME_TOOL "/bin/false" CACHE FILEPATH "")
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
set(CMAKE_OSX_SYSROOT "" CACHE STRING "")
