#define BOOST_TEST_MODULE cobuild
#include <boost/test/unit_test.hpp>
